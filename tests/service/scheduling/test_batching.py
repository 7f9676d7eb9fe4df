import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.card import ImageCard
from models.curve import Preset
from models.request import ImageRequest, PresetBudget
from service.scheduling.batching import Candidate, FairShare, form_groups, is_light, most_at_once, shape_of
from service.scheduling.cost import BlockSeconds

NUM_BLOCKS = 10


def candidate(share: float, *, turn: float = 0.0, call: float = 0.0, key: str = "a", weight: float = 1.0) -> Candidate:
    """One that runs `share` of the blocks, where a call takes `call` of the second that a block takes a lone row."""
    num_run = round(share * NUM_BLOCKS)
    runs = [1.0] * num_run + [0.0] * (NUM_BLOCKS - num_run)
    return Candidate(key, turn, runs, BlockSeconds(call, 1 - call), weight)


def predicted_seconds(members: Sequence[Candidate]) -> float:
    call, row = members[0].block_seconds
    of_blocks = list(zip(*(member.expected_runs for member in members), strict=True))
    num_calls = sum(1 - math.prod(max(0.0, 1 - runs) for runs in block) for block in of_blocks)
    return call * num_calls + row * sum(map(sum, of_blocks))


@st.composite
def _candidates(draw: st.DrawFn) -> list[Candidate]:
    cost = BlockSeconds(draw(st.floats(0, 1)), draw(st.floats(0.01, 1)))
    runs = st.lists(st.floats(0.01, 2), min_size=3, max_size=3)
    weights = st.sampled_from([0.5, 1.0, 64.0])
    one = st.builds(Candidate, st.sampled_from("ab"), st.floats(0, 10), runs, st.just(cost), weights)
    return draw(st.lists(one, min_size=1, max_size=12))


@given(_candidates())
def test_groups_have_everyone_once_and_those_of_one_key_only(candidates: list[Candidate]) -> None:
    groups = form_groups(candidates)
    assert sorted(index for group in groups for index in group) == list(range(len(candidates)))
    assert all(len({candidates[index].batch_key for index in group}) == 1 for group in groups)


@given(_candidates())
def test_leaders_have_the_first_turn_and_end_within_their_fair_share(candidates: list[Candidate]) -> None:
    groups = form_groups(candidates)
    for number, group in enumerate(groups):
        members = [candidates[index] for index in group]
        leader = members[0]
        assert leader.turn == min(candidates[i].turn for later in groups[number:] for i in later)
        for size in range(1, len(members) + 1):
            share = leader.weight / sum(member.weight for member in members[:size])
            assert predicted_seconds(members[:size]) <= 1.1 / share * predicted_seconds([leader]) * (1 + 1e-9)


def late(candidate: Candidate, slack_s: float) -> Candidate:
    return replace(candidate, slack_s=slack_s)


def test_one_that_can_not_wait_for_the_first_group_goes_before_it() -> None:
    first = candidate(1.0, call=0.5)  # takes 10 s
    assert form_groups([first, late(candidate(0.5, turn=1.0, key="b"), 11.0)]) == [[0], [1]]
    assert form_groups([first, late(candidate(0.5, turn=1.0, key="b"), 9.0)]) == [[1], [0]]
    two = [late(candidate(0.5, turn=turn, key="b"), slack_s) for turn, slack_s in ((1.0, 9.0), (2.0, 3.0))]
    assert form_groups([first, *two])[0] == [2]


def test_one_that_is_later_than_others_that_can_not_wait_keeps_its_turn() -> None:
    latest = late(candidate(1.0, call=0.5), -5.0)
    assert form_groups([latest, late(candidate(0.5, turn=1.0, key="b"), 1.0)]) == [[0], [1]]


def test_one_that_can_not_wait_does_not_go_before_the_class_that_leads() -> None:
    high = replace(candidate(1.0), is_high=True)
    assert form_groups([late(candidate(0.5, turn=-1.0), 1.0), high])[0] == [1]
    assert form_groups([late(candidate(0.5, turn=1.0), 1.0), high], high_first=False)[0] == [0]


def test_those_with_a_deadline_lead_last_if_others_are_owed_the_device() -> None:
    hurried, patient = late(candidate(0.5, turn=0.0, key="b"), 0.0), candidate(1.0, turn=1.0, call=0.5)
    assert form_groups([hurried, patient]) == [[0], [1]]
    assert form_groups([hurried, patient], deadlines_first=False) == [[1], [0]]
    high = replace(hurried, is_high=True)
    assert form_groups([high, patient], deadlines_first=False) == [[0], [1]]


def test_steps_are_shared_as_far_as_the_slack_of_the_members_allows() -> None:
    alike = [candidate(1.0, turn=number, call=0.5) for number in range(4)]  # 10 s alone, 5 s more for each other
    assert form_groups(alike) == [[0, 1, 2, 3]]
    assert form_groups([late(alike[0], 6.0), *alike[1:]])[0] == [0, 1]
    assert form_groups([late(alike[0], -1.0), *alike[1:]])[0] == [0]
    assert form_groups([alike[0], alike[1], late(alike[2], 16.0), alike[3]])[0] == [0, 1, 2, 3]
    assert form_groups([alike[0], late(alike[1], 11.0), *alike[2:]])[0] == [0, 1, 2]


@pytest.mark.parametrize("call", [0.2, 0.5, 1.0])
def test_alike_requests_share_all_their_steps(call: float) -> None:
    alike = [candidate(0.5, turn=number, call=call) for number in range(8)]
    assert form_groups(alike) == [list(range(8))]


def test_requests_that_save_nothing_together_go_one_after_the_other() -> None:
    assert form_groups([candidate(0.5, turn=number, call=0.05) for number in range(3)]) == [[0], [1], [2]]


@pytest.mark.parametrize("call", [0.0, 0.5, 1.0])
def test_a_dense_request_does_not_join_a_light_ones_step(call: float) -> None:
    light, dense = candidate(0.2, call=call), candidate(1.0, turn=1.0, call=call)
    assert form_groups([light, dense]) == [[0], [1]]


def test_a_light_request_joins_a_dense_ones_step() -> None:
    assert form_groups([candidate(1.0, call=0.5), candidate(0.2, turn=1.0, call=0.5)]) == [[0, 1]]


def test_a_dense_request_joins_so_many_light_ones_that_batching_makes_up_for_it() -> None:
    light = [candidate(0.2, call=1.0) for _ in range(6)]
    assert form_groups([*light[:3], candidate(1.0, turn=1.0, call=1.0)]) == [[0, 1, 2], [3]]
    assert form_groups([*light, candidate(1.0, turn=1.0, call=1.0)]) == [[0, 1, 2, 3, 4, 5, 6]]


def test_the_most_alike_join_first() -> None:
    shares = [0.5, 1.0, 0.2, 0.6, 0.4]
    [group] = form_groups([candidate(share, turn=float(place > 0), call=1.0) for place, share in enumerate(shares)])
    assert group[0] == 0
    assert set(group[1:3]) == {3, 4}


class Request(NamedTuple):
    """One that comes at a time, with so many steps of a second each."""

    at: float
    num_steps: int
    weight: float


_requests = st.lists(
    st.builds(Request, st.floats(0, 40), st.integers(1, 20), st.sampled_from([0.5, 1.0, 3.0, 256.0])),
    min_size=1,
    max_size=12,
)


def ends_in_turns(requests: Sequence[Request]) -> list[float]:
    """When each ends if it is served when it is its turn."""
    fair_share, now = FairShare(), 0.0
    turns: dict[int, float] = {}
    left = {index: request.num_steps for index, request in enumerate(requests)}
    ends = [0.0] * len(requests)
    while left:
        for index in left:
            if requests[index].at <= now and index not in turns:
                turns[index] = fair_share.join(requests[index].num_steps, requests[index].weight)
        if not any(index in turns for index in left):
            now = min(requests[index].at for index in left)
            continue
        leader = min((index for index in left if index in turns), key=lambda index: turns[index])
        fair_share.spend(1.0)
        now += 1.0
        left[leader] -= 1
        if not left[leader]:
            del left[leader]
            ends[leader] = now
    return ends


def ends_in_fair_shares(requests: Sequence[Request]) -> list[float]:
    """When each ends on a device that serves all at once, in proportion to their weights."""
    now, ends = 0.0, [0.0] * len(requests)
    left = {index: float(request.num_steps) for index, request in enumerate(requests)}
    while left:
        there = [index for index in left if requests[index].at <= now]
        coming = min((requests[index].at for index in left if requests[index].at > now), default=math.inf)
        weights = sum(requests[index].weight for index in there)
        first_s = min((left[index] / requests[index].weight * weights for index in there), default=math.inf)
        seconds = min(first_s, coming - now)
        for index in there:
            left[index] -= seconds * requests[index].weight / weights
        now += seconds
        for index in there:
            if left[index] < 1e-9:
                del left[index]
                ends[index] = now
    return ends


@given(_requests)
def test_nobody_ends_later_than_with_fair_shares_of_the_device(requests: list[Request]) -> None:
    in_turns, in_shares = ends_in_turns(requests), ends_in_fair_shares(requests)
    # One step may run when each comes, and be counted too late once for each that came before.
    assert all(turn <= share + 1.0 + 1e-6 * len(requests) for turn, share in zip(in_turns, in_shares, strict=True))


def test_light_requests_end_before_dense_ones_that_came_before() -> None:
    assert ends_in_turns([Request(0, 20, 1.0), Request(5, 2, 1.0)]) == [22.0, 7.0]


def test_weight_makes_a_request_come_first() -> None:
    assert ends_in_turns([Request(0, 10, 1.0), Request(1, 10, 3.0)]) == [20.0, 11.0]


def test_a_dense_request_ends_however_many_light_ones_come() -> None:
    stream = [Request(at, 1, 1.0) for at in range(200)]  # alone, these keep the device busy
    assert ends_in_turns([Request(0, 10, 1.0), *stream])[0] < 130


def test_work_that_is_no_longer_needed_delays_nobody() -> None:
    fair_share = FairShare()
    fair_share.join(100.0, 1.0)
    fair_share.spend(100.0)  # it was cancelled
    assert fair_share.join(1.0, 1.0) == 101.0


@pytest.mark.parametrize(("call", "num_companions"), [(0.0, 0), (0.9, 1), (1.0, 7)])
def test_others_join_a_weighty_leaders_step_only_where_they_hardly_delay_it(call: float, num_companions: int) -> None:
    weighty = candidate(1.0, call=call, weight=64)
    others = [candidate(1.0, turn=1.0, call=call) for _ in range(7)]
    assert form_groups([weighty, *others])[0] == [*range(1 + num_companions)]
    # It joins theirs wherever that saves time
    assert (0 in form_groups([replace(weighty, turn=2.0), *others])[0]) == (call > 0)


def test_shape_is_model_and_size(make_request: Callable[..., ImageRequest]) -> None:
    assert shape_of(make_request(seed=1)) == shape_of(
        make_request(seed=2, prompt="other", num_inference_steps=9, true_cfg_scale=2.0)
    )
    for different in ({"width": 128}, {"model": "guided"}, {"budget": PresetBudget(Preset.EXACT)}):
        assert shape_of(make_request(**different)) != shape_of(make_request())


def test_light_requests_have_a_shape_of_their_own_and_exact_ones_few_places(
    make_request: Callable[..., ImageRequest], forecasting_card: ImageCard
) -> None:
    budgets = [PresetBudget(preset) for preset in (Preset.EXACT, Preset.BALANCED, Preset.DRAFT)]
    exact, usual, light = (
        shape_of(make_request(card=forecasting_card, num_inference_steps=8, budget=budget)) for budget in budgets
    )
    assert [is_light(shape) for shape in (exact, usual, light)] == [False, False, True]
    assert [most_at_once(shape, 8) for shape in (exact, usual, light)] == [2, 8, 8]
    assert most_at_once(exact, 1) == 1
