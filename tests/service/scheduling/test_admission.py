from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.card import DecodeSpeed, ImageCard, MeshCard
from models.curve import EXACT as EXACT_POINT
from models.curve import ComputedSteps, Preset
from models.request import Budget, ComputeBudget, ImageRequest, LatencyBudget, MeshRequest, PresetBudget, QualityBudget
from service.errors import DeadlineUnreachable, Overloaded
from service.jobs.job import Job
from service.order import Order, Output
from service.scheduling.admission import Backlog, Promises, admit

MakeOrder = Callable[..., Order]

seconds = st.floats(min_value=0.01, max_value=1e6)


@pytest.fixture
def make_order(make_request: Callable[..., ImageRequest]) -> MakeOrder:
    def make(budget: Budget, *, steps: int = 4, n: int = 1, min_quality: float | None = None) -> Order:
        request = make_request(budget=budget, num_inference_steps=steps)
        return Order(tuple(replace(request, seed=seed) for seed in range(n)), Output(), None, min_quality)

    return make


def backlog(seconds: float, max_seconds: float = 60.0, finish_s: float = 0.0) -> Backlog:
    return Backlog(seconds, max_seconds, finish_s)


# A dense step of the card takes 0.5 s. Encoding and decoding take no time.
EXACT = PresetBudget(Preset.EXACT)


def test_full_server_says_when_to_come_back(make_order: MakeOrder, drawn_card: ImageCard) -> None:
    with pytest.raises(
        Overloaded, match=r"55\.0 s of work.*would add 10\.0 s.*60 s it accepts; try again in 35 s"
    ) as caught:
        admit(make_order(EXACT, steps=20), drawn_card, backlog(55))
    assert caught.value.retry_after_s == 35


def test_deadline_waits_for_urgent_work_only(make_order: MakeOrder, drawn_card: ImageCard) -> None:
    order = make_order(LatencyBudget(5.0))
    with pytest.raises(DeadlineUnreachable, match="5000 of them are the work of earlier"):
        admit(order, drawn_card, backlog(5.0))
    with pytest.raises(DeadlineUnreachable, match="4000 of them are the work of earlier"):
        admit(order, drawn_card, replace(backlog(5.0), urgent_seconds=4.0))
    assert admit(order, drawn_card, replace(backlog(5.0), urgent_seconds=3.0)).latency_s == 5.0
    assert admit(order, drawn_card, replace(backlog(0.0), urgent_seconds=9.0)).latency_s == 5.0  # nothing runs at all
    with pytest.raises(Overloaded):
        admit(order, drawn_card, replace(backlog(60.0), urgent_seconds=3.0))


def test_idle_server_takes_any_order(make_order: MakeOrder, drawn_card: ImageCard) -> None:
    admission = admit(make_order(EXACT, steps=2000), drawn_card, backlog(0))
    assert admission.predicted_seconds == pytest.approx(1000)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.integers(1, 10_000), backlog_s=seconds, max_backlog_s=seconds)
def test_order_is_admitted_after_the_wait(
    steps: int, backlog_s: float, max_backlog_s: float, make_order: MakeOrder, drawn_card: ImageCard
) -> None:
    order, retry_after_s = make_order(EXACT, steps=steps), 0
    try:
        admit(order, drawn_card, backlog(backlog_s, max_backlog_s))
    except Overloaded as error:
        retry_after_s = error.retry_after_s or 0
    admit(order, drawn_card, backlog(max(0.0, backlog_s - retry_after_s), max_backlog_s))


def test_full_server_asks_to_wait_until_half_of_its_work_is_done(make_order: MakeOrder, drawn_card: ImageCard) -> None:
    for seconds, retry_after_s in ((60, 32), (90, 62), (600, 572)):  # the pace may show that it accepted too much
        with pytest.raises(Overloaded) as caught:
            admit(make_order(EXACT), drawn_card, backlog(seconds))
        assert caught.value.retry_after_s == retry_after_s


def test_measured_pace_counts_for_the_order_but_not_for_its_record(
    make_order: MakeOrder, drawn_card: ImageCard
) -> None:
    slow = replace(backlog(55), pace=3.0)
    with pytest.raises(Overloaded, match=r"would add 6\.0 s"):
        admit(make_order(EXACT), drawn_card, slow)
    assert admit(make_order(EXACT), drawn_card, replace(slow, seconds=10)).predicted_seconds == pytest.approx(2)


def test_encoding_and_decoding_count(make_order: MakeOrder, drawn_card: ImageCard) -> None:
    card = replace(drawn_card, encode_seconds=0.3, decode_seconds=0.7)
    admission = admit(make_order(EXACT, n=2), card, backlog(0))
    # The prompt is encoded once for both
    assert admission.predicted_seconds == pytest.approx(2 * 3.0 - 0.3)
    with pytest.raises(DeadlineUnreachable):
        admit(make_order(LatencyBudget(1.2)), card, backlog(0))


def test_input_images_of_waiting_orders_are_bounded(mesh_card: MeshCard) -> None:
    mesh = MeshRequest(
        model="ball",
        num_inference_steps=1,
        guidance_scale=1.0,
        seed=0,
        budget=EXACT,
        point=EXACT_POINT,
        is_guided=False,
        input_image=b"12345",
        octree_resolution=64,
    )
    order = Order((mesh,), Output(), None, None)
    bounded = replace(backlog(6.0), max_image_bytes=14)
    for waiting in (0, 9):
        admit(order, mesh_card, replace(bounded, image_bytes=waiting))
    with pytest.raises(Overloaded, match=r"10 bytes and this one would add 5, more than the 14") as caught:
        admit(order, mesh_card, replace(bounded, image_bytes=10))
    assert caught.value.retry_after_s == 3
    # One image that is larger than the bound is accepted alone
    admit(order, mesh_card, replace(bounded, max_image_bytes=1))


def test_cost_of_every_result_counts(make_order: MakeOrder, drawn_card: ImageCard) -> None:
    admission = admit(make_order(QualityBudget(0.9), n=3), drawn_card, backlog(0))
    assert admission.predicted_seconds == pytest.approx(3 * 4 * 0.5 * 0.64)


def test_load_lowers_the_computed_steps_of_any_schedule(
    make_request: Callable[..., ImageRequest], forecasting_card: ImageCard
) -> None:
    request = make_request(card=forecasting_card, budget=EXACT, num_inference_steps=16)
    admission = admit(Order((request,), Output(), None, 0.6), forecasting_card, backlog(90, max_seconds=100))
    # The calibrated draft computes two steps; other schedules compute one more.
    assert admission.order.point.steps == ComputedSteps(3, 16)
    assert admission.predicted_seconds == pytest.approx(1.5)


def test_deadline_is_promised_if_it_can_be_met(make_order: MakeOrder, drawn_card: ImageCard) -> None:
    assert admit(make_order(LatencyBudget(1.7)), drawn_card, backlog(0.5)).latency_s == 1.7
    with pytest.raises(DeadlineUnreachable):
        admit(make_order(LatencyBudget(1.7)), drawn_card, backlog(0.5, finish_s=0.2))
    assert admit(make_order(EXACT), drawn_card, backlog(0.5)).latency_s is None


@pytest.mark.parametrize(
    ("budget", "min_quality", "load", "quality", "is_degraded"),
    [
        (EXACT, 0.8, 0.2, 1.0, False),
        (EXACT, 0.8, 0.5, 0.9, True),
        (EXACT, 0.8, 0.9, 0.8, True),
        (EXACT, None, 0.9, 1.0, False),
        (QualityBudget(0.9), 0.9, 0.9, 0.9, False),
        (ComputeBudget(0.8), 0.6, 0.9, 0.6, True),
    ],
)
def test_load_lowers_quality_down_to_the_floor_and_no_further(
    budget: Budget,
    min_quality: float | None,
    load: float,
    quality: float,
    is_degraded: bool,
    make_order: MakeOrder,
    drawn_card: ImageCard,
) -> None:
    order = make_order(budget, min_quality=min_quality, n=2)
    admission = admit(order, drawn_card, backlog(load * 100, max_seconds=100))
    assert admission.is_degraded is is_degraded
    assert admission.order.point.quality == pytest.approx(quality)
    assert {request.point for request in admission.order.requests} == {admission.order.point}
    if not is_degraded:
        assert admission.order is order


def test_decoding_of_a_mesh_counts(mesh_card: MeshCard, make_mesh_job: Callable[..., Job]) -> None:
    card = replace(mesh_card, decode_speed=DecodeSpeed(field_point=0.0, grid_point=0.0, face=1e-5))  # 11 s at 512
    job = make_mesh_job("mesh", octree_resolution=512)
    order = Order(job.requests, job.output, None, None)
    admission = admit(order, card, backlog(0))
    assert admission.decode_seconds == pytest.approx(11.0, abs=0.1)
    assert admission.predicted_seconds == pytest.approx(13.0, abs=0.1)
    with pytest.raises(Overloaded, match=r"would add 13\.0 s"):
        admit(order, card, backlog(50))
    request = job.requests[0]
    assert isinstance(request, MeshRequest)
    hasty = replace(request, budget=LatencyBudget(5.0))
    with pytest.raises(DeadlineUnreachable, match="needs 1"):
        admit(replace(order, requests=(hasty,)), card, backlog(0))
    admit(replace(order, requests=(replace(hasty, octree_resolution=64),)), card, backlog(0))


def test_one_key_may_have_as_much_as_is_left_free_by_its_weight(make_order: MakeOrder, drawn_card: ImageCard) -> None:
    order, busy = make_order(EXACT), replace(backlog(50), own_s=39.0, weight=1.0)  # four times the 10 s that are free
    with pytest.raises(
        Overloaded, match=r"has 39\.0 s of work here and this request would add 2\.0 s, more than the 40"
    ):
        admit(order, drawn_card, busy)
    for allowed in (
        replace(busy, own_s=37.0),
        replace(busy, weight=2.0),
        replace(busy, own_s=0.0),  # a key that has nothing may have any order
        replace(busy, weight=None),  # a server without keys
    ):
        admit(order, drawn_card, allowed)


def test_those_who_are_told_to_come_again_are_spread_out(make_order: MakeOrder, drawn_card: ImageCard) -> None:
    full, waits = backlog(60), []
    for promised_s in (0.0, 20.0, 500.0):
        with pytest.raises(Overloaded) as caught:
            admit(make_order(EXACT), drawn_card, replace(full, promised_s=promised_s))
        waits.append(caught.value.retry_after_s)
    assert waits == [32, 52, 152]  # at most twice the longest backlog more: callers may never come again


def test_promises_count_until_their_time_has_come() -> None:
    promises = Promises()
    promises.add(10.0, 2.0)
    promises.add(5.0, 1.0)
    assert [promises.seconds(now) for now in (0.0, 5.0, 9.0, 10.0)] == [3.0, 2.0, 2.0, 0.0]
