import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scheduling.fleet import Load, ModelLoad, WorkerState, seconds_before
from service.scheduling.waiting import QueuePlace, backlog_s, pace_of, place_of, wanted_workers
from tests.fixtures.workers import worker

LOAD = Load({"a": ModelLoad(4, 1, queued_s=40.0, running_s=6.0), "b": ModelLoad(2, 0, queued_s=8.0)})


def test_a_job_waits_for_what_runs_and_for_those_before_it() -> None:
    assert place_of("a", 10.0, 0, LOAD, [worker("a")]) == QueuePlace(0, 6.0 + 10.0)
    assert place_of("a", 10.0, 3, LOAD, [worker("a")]) == QueuePlace(3, 6.0 + 30.0 + 10.0)


def test_two_workers_halve_the_wait_but_not_the_job_itself() -> None:
    assert place_of("a", 10.0, 2, LOAD, [worker("a"), worker("a")]) == QueuePlace(2, (6.0 + 20.0) / 2 + 10.0)


def test_pace_lengthens_the_wait_and_the_job() -> None:
    assert place_of("a", 10.0, 0, LOAD, [worker("a", pace=1.5)]) == QueuePlace(0, 24.0)


def test_jobs_of_other_models_on_its_worker_come_before_the_last_job_of_its_own() -> None:
    assert place_of("a", 10.0, 3, LOAD, [worker("a", "b")]) == QueuePlace(3, 6.0 + 30.0 + 8.0 + 10.0)
    assert place_of("a", 10.0, 0, LOAD, [worker("a", "b")]) == QueuePlace(0, 6.0 + 8.0 / 4 + 10.0)


def test_a_job_without_a_worker_has_a_place_and_no_end() -> None:
    assert place_of("a", 10.0, 2, LOAD, [worker("b")]) == QueuePlace(2, None)
    assert place_of("a", 10.0, 2, LOAD, [worker("a", state=WorkerState.DRAINING)]) == QueuePlace(2, None)


def test_a_place_beyond_what_was_counted_is_the_last_one() -> None:
    """The place and the load are read one after the other."""
    assert place_of("c", 10.0, 1, Load(), [worker("c")]) == QueuePlace(1, 10.0)


@given(
    st.integers(0, 20), st.integers(0, 20), st.floats(0, 1e4), st.floats(0, 1e4), st.integers(1, 5), st.floats(0.1, 9)
)
def test_the_end_comes_no_earlier_for_a_later_place_and_never_beyond_all_work(
    position: int, later: int, queued_s: float, running_s: float, num_workers: int, pace: float
) -> None:
    load = Load({"a": ModelLoad(21, 1, queued_s=queued_s, running_s=running_s), "b": ModelLoad(3, queued_s=5.0)})
    workers = [worker("a", "b", pace=pace)] * num_workers
    first, second = sorted((position, later))
    sooner, after = place_of("a", 2.0, first, load, workers).eta_s, place_of("a", 2.0, second, load, workers).eta_s
    assert sooner is not None
    assert after is not None
    assert 0 < sooner <= after + 1e-6
    assert after <= (seconds_before("a", load, workers) + 2.0 * pace) * (1 + 1e-9)


def test_a_backlog_is_what_one_worker_would_take_at_the_mean_pace() -> None:
    workers = [worker("a", pace=0.5), worker("a", pace=1.5), worker("a", pace=7.0, state=WorkerState.DRAINING)]
    assert backlog_s("a", LOAD, workers) == 46.0
    assert pace_of("a", workers) == pytest.approx(1.0)
    assert (backlog_s("b", LOAD, []), pace_of("b", [])) == (8.0, None)


@pytest.mark.parametrize(
    ("queued_s", "num_busy", "wanted"), [(0.0, 0, 0), (0.1, 0, 1), (20.0, 0, 2), (20.1, 0, 3), (5.0, 4, 4)]
)
def test_workers_are_wanted_for_the_backlog_and_busy_ones_stay(queued_s: float, num_busy: int, wanted: int) -> None:
    workers = [worker("a", state=WorkerState.BUSY)] * num_busy
    workers += [worker("a", state=WorkerState.DRAINING), worker("b", state=WorkerState.BUSY)]
    assert wanted_workers("a", Load({"a": ModelLoad(queued_s=queued_s)}), workers, 10.0) == wanted
