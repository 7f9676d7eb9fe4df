import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.curve import Preset
from models.request import ImageRequest, PresetBudget
from service.scheduling.batching import Candidate, FairShare, form_groups, shape_of
from service.scheduling.cost import BlockSeconds

NUM_BLOCKS = 10


def candidate(
    share: float, *, virtual_time: float = 0.0, call: float = 0.0, key: str = "a", weight: float = 1.0
) -> Candidate:
    """One that runs `share` of the blocks, where a call takes `call` of the second that a block takes a lone row."""
    num_run = round(share * NUM_BLOCKS)
    runs = [1.0] * num_run + [0.0] * (NUM_BLOCKS - num_run)
    return Candidate(key, virtual_time, runs, BlockSeconds(call, 1 - call), weight)


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
def test_leaders_have_the_least_virtual_time_and_end_within_their_fair_share(candidates: list[Candidate]) -> None:
    groups = form_groups(candidates)
    for number, group in enumerate(groups):
        members = [candidates[index] for index in group]
        leader = members[0]
        assert leader.virtual_time == min(candidates[i].virtual_time for later in groups[number:] for i in later)
        for size in range(1, len(members) + 1):
            share = leader.weight / sum(member.weight for member in members[:size])
            assert predicted_seconds(members[:size]) <= 1.1 / share * predicted_seconds([leader]) * (1 + 1e-9)


@pytest.mark.parametrize("call", [0.0, 0.5, 1.0])
def test_alike_requests_share_all_their_steps(call: float) -> None:
    alike = [candidate(0.5, virtual_time=number, call=call) for number in range(8)]
    assert form_groups(alike) == [list(range(8))]


@pytest.mark.parametrize("call", [0.0, 0.5, 1.0])
def test_a_dense_request_does_not_join_a_light_ones_step(call: float) -> None:
    light, dense = candidate(0.2, call=call), candidate(1.0, virtual_time=1.0, call=call)
    assert form_groups([light, dense]) == [[0], [1]]


def test_a_light_request_joins_a_dense_ones_step() -> None:
    assert form_groups([candidate(1.0), candidate(0.2, virtual_time=1.0)]) == [[0, 1]]


def test_a_dense_request_joins_so_many_light_ones_that_batching_makes_up_for_it() -> None:
    light = [candidate(0.2, call=1.0) for _ in range(6)]
    assert form_groups([*light[:3], candidate(1.0, virtual_time=1.0, call=1.0)]) == [[0, 1, 2], [3]]
    assert form_groups([*light, candidate(1.0, virtual_time=1.0, call=1.0)]) == [[0, 1, 2, 3, 4, 5, 6]]


def test_the_most_alike_join_first() -> None:
    shares = [0.5, 1.0, 0.2, 0.6, 0.4]
    [group] = form_groups(
        [candidate(share, virtual_time=float(place > 0), call=1.0) for place, share in enumerate(shares)]
    )
    assert group[0] == 0
    assert set(group[1:3]) == {3, 4}


def take_turns(candidates: list[Candidate], fair_share: FairShare, num_turns: int) -> list[int]:
    """Steps that each gets."""
    num_steps = [0] * len(candidates)
    for _ in range(num_turns):
        group = form_groups(candidates)[0]
        members = [candidates[index] for index in group]
        virtual_times = fair_share.after_step(members, predicted_seconds(members))
        for index, virtual_time in zip(group, virtual_times, strict=True):
            candidates[index] = replace(candidates[index], virtual_time=virtual_time)
            num_steps[index] += 1
    return num_steps


def test_light_requests_get_steps_as_they_need_less_time() -> None:
    dense, light = take_turns([candidate(1.0), candidate(0.2)], FairShare(), 60)
    assert light / dense == pytest.approx(5, rel=0.1)


def test_weight_is_the_share_of_the_device() -> None:
    # Of shapes that can't share steps.
    rivals = [candidate(1.0, key="a", weight=2), candidate(1.0, key="b", weight=0.5)]
    high, low = take_turns(rivals, FairShare(), 60)
    assert high / low == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(("call", "num_companions"), [(0.0, 0), (0.9, 1), (1.0, 7)])
def test_others_join_a_weighty_leaders_step_only_where_they_hardly_delay_it(call: float, num_companions: int) -> None:
    weighty = candidate(1.0, call=call, weight=64)
    others = [candidate(1.0, virtual_time=1.0, call=call) for _ in range(7)]
    assert form_groups([weighty, *others])[0] == [*range(1 + num_companions)]
    # It joins theirs in any case
    assert 0 in form_groups([replace(weighty, virtual_time=2.0), *others])[0]


def test_nobody_starves_however_many_light_ones_come() -> None:
    fair_share = FairShare()
    dense = candidate(1.0)
    waiting = [dense, *(candidate(0.1, key="b") for _ in range(3))]
    num_steps = 0
    for _ in range(400):
        group = form_groups(waiting)[0]
        members = [waiting[index] for index in group]
        virtual_times = fair_share.after_step(members, predicted_seconds(members))
        for index, virtual_time in zip(group, virtual_times, strict=True):
            # A light one has but one step, and another comes in its place.
            waiting[index] = replace(waiting[index], virtual_time=fair_share.at_start if index else virtual_time)
        num_steps += 0 in group
    assert num_steps >= 400 / 3 / 11  # three of a tenth in each of its turns


def test_who_comes_later_starts_where_the_last_leader_is() -> None:
    fair_share = FairShare()
    assert fair_share.at_start == 0
    take_turns([candidate(1.0)], fair_share, 3)
    assert fair_share.at_start == pytest.approx(3 * NUM_BLOCKS)


def test_shape_is_model_and_size(make_request: Callable[..., ImageRequest]) -> None:
    assert shape_of(make_request(seed=1)) == shape_of(
        make_request(seed=2, prompt="other", num_inference_steps=9, true_cfg_scale=2.0)
    )
    for different in ({"width": 128}, {"model": "guided"}, {"budget": PresetBudget(Preset.EXACT)}):
        assert shape_of(make_request(**different)) != shape_of(make_request())
