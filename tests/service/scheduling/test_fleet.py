import math
from dataclasses import replace

from service.scheduling.fleet import (
    Load,
    ModelLoad,
    WorkerState,
    seconds_before,
    urgent_seconds_before,
)
from tests.fixtures.workers import worker

LOAD = Load({"a": ModelLoad(3, 1, queued_s=30.0, running_s=10.0), "b": ModelLoad(queued_s=12.0)})


def test_work_is_spread_over_the_workers_that_have_its_model() -> None:
    assert seconds_before("a", LOAD, [worker("a")]) == 40.0
    assert seconds_before("a", LOAD, [worker("a"), worker("a")]) == 20.0
    assert seconds_before("b", LOAD, [worker("a"), worker("b")]) == 12.0


def test_a_worker_of_several_models_has_the_work_of_all_of_them() -> None:
    assert seconds_before("b", LOAD, [worker("a", "b")]) == 52.0
    assert seconds_before("b", LOAD, [worker("a", "b"), worker("a")]) == 32.0


def test_each_worker_has_its_own_pace() -> None:
    assert seconds_before("a", LOAD, [worker("a", pace=0.5), worker("a", pace=1.5)]) == 20.0


def test_a_model_without_a_worker_is_never_reached() -> None:
    assert seconds_before("c", LOAD, [worker("a")]) == math.inf
    assert seconds_before("a", LOAD, [replace(worker("a"), state=WorkerState.DRAINING)]) == math.inf


def test_a_deadline_waits_for_urgent_work_and_two_steps_only() -> None:
    load = Load({"a": ModelLoad(9, 3, 90.0, 30.0, urgent_s=6.0), "b": ModelLoad(1, queued_s=5.0, urgent_s=5.0)})
    slow = replace(worker("a"), step_s=2.0)
    assert urgent_seconds_before("a", load, [worker("a")]) == 6.0
    assert urgent_seconds_before("a", load, [slow]) == 6.0 + 2 * 2.0
    assert urgent_seconds_before("a", load, [replace(worker("a", "b"), step_pace=2.0)]) == 2 * 11.0
    assert urgent_seconds_before("a", load, [replace(worker("a", "b", pace=0.5), step_pace=0.9)]) == 11.0
    # Any worker may take it, and may have taken more urgent work than others
    assert urgent_seconds_before("a", load, [slow, worker("a")]) == 6.0 + 2 * 2.0
    assert urgent_seconds_before("a", load, [worker("a")] * 4) == 3.0


def test_all_work_counts_where_urgent_jobs_wait_for_others() -> None:
    assert urgent_seconds_before("a", LOAD, [worker("a"), replace(worker("a"), urgent_waits=True)]) == math.inf
    assert urgent_seconds_before("c", LOAD, [worker("a")]) == math.inf
    leaving = replace(worker("a"), state=WorkerState.DRAINING, urgent_waits=True)
    assert urgent_seconds_before("a", LOAD, [worker("a"), leaving]) < math.inf


def test_a_running_job_counts_until_it_has_ended() -> None:
    assert ModelLoad(num_running=3, running_s=0.2, queued_s=5.0).backlog_s == 8.0
