from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.card import ImageCard
from models.curve import Preset
from models.request import ImageEdit, ImageRequest, LatencyBudget
from service.errors import DeadlineUnreachable
from service.scheduling.cost import predicted_seconds
from service.scheduling.deadline import planned_point, point_for, seconds_for_steps, slack_s
from service.scheduling.load import lowered_quality

MakeRequest = Callable[..., ImageRequest]


# The card's dense step takes 0.5 s; relative seconds fall from 1 over .82, .64, .55 to .46. The answer takes 0.05 s,
# and a tenth of the whole time is kept in reserve.
@pytest.mark.parametrize(
    ("latency_s", "backlog_s", "finish_s", "num_results"),
    [(1.0, 0.0, 0.0, 1), (1.7, 0.5, 0.1, 1), (1.7, 0.0, 0.6, 1), (2.05, 0.0, 0.0, 2)],
)
def test_deadline_that_even_the_lowest_quality_misses_is_refused(
    latency_s: float,
    backlog_s: float,
    finish_s: float,
    num_results: int,
    make_request: MakeRequest,
    drawn_card: ImageCard,
) -> None:
    check = partial(planned_point, backlog_s=backlog_s, finish_s=finish_s, num_results=num_results)
    with pytest.raises(DeadlineUnreachable, match="can't be met"):
        check(make_request(budget=LatencyBudget(latency_s)), drawn_card)
    check(make_request(budget=LatencyBudget(latency_s + 0.1)), drawn_card)


def test_deadline_of_an_edit_is_judged_by_the_steps_it_takes(make_request: MakeRequest, drawn_card: ImageCard) -> None:
    check = partial(planned_point, card=drawn_card, num_results=1, backlog_s=0.0, finish_s=0.0)
    edit = ImageEdit((b"",), None, 0.5)
    check(make_request(budget=LatencyBudget(0.6), edit=edit))
    with pytest.raises(DeadlineUnreachable, match="needs 567 ms"):
        check(make_request(budget=LatencyBudget(0.4), edit=edit))


def test_floor_counts_when_a_deadline_is_judged(make_request: MakeRequest, drawn_card: ImageCard) -> None:
    with pytest.raises(DeadlineUnreachable, match=r"allowed, 0.90, .* 1478 ms"):
        planned_point(
            make_request(budget=LatencyBudget(1.2, min_quality=0.9)),
            drawn_card,
            num_results=1,
            backlog_s=0,
            finish_s=0,
        )


@pytest.mark.parametrize(
    ("time_left_s", "steps_left", "pace", "quality"),
    [
        (2.2, 4, 1.0, 1.0),
        (2.0, 4, 1.0, 0.97),
        (1.2, 4, 1.0, 0.8),
        (0.1, 4, 1.0, 0.6),
        (2.2, 4, 2.0, 0.6),
        (-1, 1, 1, 0.6),
    ],
)
def test_step_is_as_good_as_the_time_left_allows(
    time_left_s: float,
    steps_left: int,
    pace: float,
    quality: float,
    make_request: MakeRequest,
    drawn_card: ImageCard,
) -> None:
    request = make_request(budget=LatencyBudget(9.0))
    point = point_for(request, drawn_card, time_left_s=time_left_s, steps_left=steps_left, num_computed=0, pace=pace)
    assert point.quality == quality


# Four steps of 0.5 s at the floor's 0.46 take 0.92 s.
@pytest.mark.parametrize(
    ("time_left_s", "steps_left", "pace", "expected_s"),
    [(2.0, 4, 1.0, 1.9 - 0.92), (2.0, 2, 1.0, 1.9 - 0.46), (2.0, 4, 2.0, 0.95 - 0.92), (0.5, 4, 1.0, 0.475 - 0.92)],
)
def test_slack_is_what_the_remaining_steps_leave_at_the_floor(
    time_left_s: float,
    steps_left: int,
    pace: float,
    expected_s: float,
    make_request: MakeRequest,
    drawn_card: ImageCard,
) -> None:
    request = make_request(budget=LatencyBudget(9.0, 0.6))
    left = slack_s(
        request, drawn_card, time_left_s=time_left_s, steps_left=steps_left, num_computed=4 - steps_left, pace=pace
    )
    assert left == pytest.approx(expected_s)


@pytest.mark.parametrize(("finish_s", "side", "expected_s"), [(0.0, 64, 2.75), (0.2, 64, 2.35), (0.2, 128, 1.15)])
def test_last_step_ends_in_time_for_two_files_and_the_answer(
    finish_s: float, side: int, expected_s: float, make_request: MakeRequest, drawn_card: ImageCard
) -> None:
    request = make_request(budget=LatencyBudget(10.0), width=side, height=side)
    assert seconds_for_steps(request, drawn_card, left_s=3.0, finish_s=finish_s) == pytest.approx(expected_s)


# It needs 0.92 s, 0.05 s for the answer, and a tenth in reserve.
@pytest.mark.parametrize(("pace", "is_admitted"), [(0.5, True), (1.0, True), (1.2, False)])
def test_slower_pace_than_predicted_counts_for_the_request_itself(
    pace: float, is_admitted: bool, make_request: MakeRequest, drawn_card: ImageCard
) -> None:
    request = make_request(budget=LatencyBudget(1.1))
    outcome: AbstractContextManager[object] = nullcontext() if is_admitted else pytest.raises(DeadlineUnreachable)
    with outcome:
        planned_point(request, drawn_card, num_results=1, backlog_s=0, finish_s=0, pace=pace)


# Draft computes two of eight steps, balanced four; each takes 0.5 s.
@pytest.mark.parametrize(
    ("time_left_s", "steps_left", "num_computed", "preset"),
    [
        (4.3, 8, 0, Preset.EXACT),
        (2.2, 8, 0, Preset.BALANCED),
        (2.0, 8, 0, Preset.DRAFT),
        (0.1, 8, 0, Preset.DRAFT),
        (1.1, 2, 3, Preset.EXACT),
        (0.6, 2, 3, Preset.BALANCED),
        (0.6, 6, 1, Preset.DRAFT),
        (0.6, 6, 6, Preset.BALANCED),
    ],
)
def test_deadline_leaves_as_many_steps_to_compute_as_there_is_time_for(
    time_left_s: float,
    steps_left: int,
    num_computed: int,
    preset: Preset,
    make_request: MakeRequest,
    forecasting_card: ImageCard,
) -> None:
    request = make_request(card=forecasting_card, budget=LatencyBudget(9.0))
    point = point_for(
        request,
        forecasting_card,
        time_left_s=time_left_s,
        steps_left=steps_left,
        num_computed=num_computed,
        pace=1.0,
    )
    assert point.preset == preset


def test_deadline_of_another_number_of_steps_is_judged_by_the_steps_it_computes(
    make_request: MakeRequest, forecasting_card: ImageCard
) -> None:
    check = partial(planned_point, num_results=1, backlog_s=0, finish_s=0)
    with pytest.raises(DeadlineUnreachable, match="needs 1722 ms"):
        check(make_request(card=forecasting_card, budget=LatencyBudget(1.4), num_inference_steps=40), forecasting_card)
    check(make_request(card=forecasting_card, budget=LatencyBudget(1.2)), forecasting_card)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_step_is_never_below_the_floor(data: st.DataObject, make_request: MakeRequest, drawn_card: ImageCard) -> None:
    min_quality = data.draw(st.floats(0, 1))
    point = point_for(
        make_request(budget=LatencyBudget(1.0, min_quality)),
        drawn_card,
        time_left_s=data.draw(st.floats(-1, 10)),
        steps_left=data.draw(st.integers(1, 50)),
        num_computed=data.draw(st.integers(0, 50)),
        pace=data.draw(st.floats(0.01, 100)),
    )
    assert point.quality >= min_quality


# The floor of .6 takes 0.92 s; a tenth of the time and 0.05 s are kept. Of what is left, three tenths count.
@pytest.mark.parametrize(
    ("latency_s", "backlog_s", "num_results", "quality"),
    [(1.1, 0.0, 1, 0.6), (1.9, 0.0, 1, 0.8), (9.0, 0.0, 1, 1.0), (9.0, 7.0, 1, 0.6), (3.9, 0.0, 2, 0.8)],
)
def test_plan_leaves_time_for_those_that_come_later(
    latency_s: float,
    backlog_s: float,
    num_results: int,
    quality: float,
    make_request: MakeRequest,
    drawn_card: ImageCard,
) -> None:
    request = make_request(budget=LatencyBudget(latency_s))
    point = planned_point(request, drawn_card, num_results=num_results, backlog_s=backlog_s, finish_s=0.0)
    assert point.quality == quality


def test_plan_is_never_below_the_floor(make_request: MakeRequest, drawn_card: ImageCard) -> None:
    request = make_request(budget=LatencyBudget(1.5, min_quality=0.8))
    assert planned_point(request, drawn_card, num_results=1, backlog_s=0.0, finish_s=0.0).quality == 0.8


def test_step_is_no_better_than_allowed(make_request: MakeRequest, drawn_card: ImageCard) -> None:
    left = partial(point_for, make_request(budget=LatencyBudget(9.0)), drawn_card, time_left_s=9.0)
    assert left(steps_left=4, num_computed=0, pace=1.0, best=0.95).quality == 0.9
    assert left(steps_left=4, num_computed=0, pace=1.0).quality == 1.0


def test_cost_of_a_deadline_is_that_of_its_plan(make_request: MakeRequest, drawn_card: ImageCard) -> None:
    request = make_request(budget=LatencyBudget(9.0))
    assert predicted_seconds(request, drawn_card) == 2.0
    assert predicted_seconds(replace(request, point=drawn_card.curve[-1]), drawn_card) == pytest.approx(0.92)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 500))
def test_load_lowers_quality_only_down_to_the_floor(quality: float, floor: float, backlog_s: float) -> None:
    lowered = lowered_quality(quality, floor, backlog_s=backlog_s, max_backlog_s=100)
    assert min(quality, floor) - 1e-9 <= lowered <= quality
    if backlog_s <= 25:
        assert lowered == quality
    if backlog_s >= 75:
        assert lowered == pytest.approx(min(quality, floor))
