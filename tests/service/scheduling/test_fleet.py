import math
from dataclasses import replace

from service.scheduling.fleet import (
    Load,
    ModelLoad,
    WorkerState,
    seconds_before,
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


def test_a_running_job_counts_until_it_has_ended() -> None:
    assert ModelLoad(num_running=3, running_s=0.2, queued_s=5.0).backlog_s == 8.0
