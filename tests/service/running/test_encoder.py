"""Prompts and images are encoded beside the steps, once a job."""

from collections.abc import Callable
from typing import Any

import pytest

from models.errors import InvalidRequest
from service.jobs.job import FailureReason, Job, JobStatus
from service.settings import Settings
from tests.fixtures.waiting import wait_until

MakeJob = Callable[..., Job]
TIMEOUT_S = 20


def test_images_of_a_job_share_what_is_encoded(service: Any, engine: Any, make_job: MakeJob) -> None:
    finished = service.submit(make_job("a", seeds=(5, 6, 7, 8), prompt="known")).result(TIMEOUT_S)
    assert finished.state.status is JobStatus.SUCCEEDED
    assert engine.encoded == [(5, False), (6, True), (7, True), (8, True)]
    # The first alone has looked for its prompt, and found it
    service.submit(make_job("b", seeds=(1, 2))).result(TIMEOUT_S)
    page = service.dispatcher.metrics.exposition({}).decode()
    assert 'elastic_prompts_total{model="drawn",outcome="hit"} 1.0' in page
    assert 'elastic_prompts_total{model="drawn",outcome="miss"} 1.0' in page


def test_steps_go_on_while_a_prompt_is_encoded(service: Any, engine: Any, make_job: MakeJob) -> None:
    engine.gate.clear()
    first = service.submit(make_job("first", seeds=(1,)))
    assert engine.stepping.wait(TIMEOUT_S)
    engine.encoding.clear()
    engine.encoding_gate.clear()
    second = service.submit(make_job("second", seeds=(2,)))
    assert engine.encoding.wait(TIMEOUT_S)  # though a step is running
    engine.gate.set()
    assert first.result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED
    assert engine.started == [1]
    engine.encoding_gate.set()
    assert second.result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED


def test_a_job_that_is_cancelled_while_it_is_encoded_never_starts(service: Any, engine: Any, make_job: MakeJob) -> None:
    engine.encoding_gate.clear()
    cancelled = service.submit(make_job("a", seeds=(1, 2)))
    assert engine.encoding.wait(TIMEOUT_S)
    service.cancel("a")
    assert cancelled.result(TIMEOUT_S).state.status is JobStatus.CANCELLED
    engine.encoding_gate.set()
    service.submit(make_job("b", seeds=(3,))).result(TIMEOUT_S)
    assert engine.started == [3]
    assert [seed for seed, _ in engine.encoded] == [1, 3]


def test_a_prompt_that_is_refused_fails_its_job_alone_and_without_room(
    start_service: Callable[[Settings], Any], engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second image's prompt is refused while the first one takes the only place."""
    encode = engine.encode

    def refuse_second(request: Any, branches: Any) -> Any:
        if request.seed == 2:
            raise InvalidRequest("the prompt has 900 tokens; try 512", "prompt")
        return encode(request, branches)

    monkeypatch.setattr(engine, "encode", refuse_second)
    service = start_service(Settings(max_running=1))
    engine.gate.clear()
    refused = service.submit(make_job("refused", seeds=(1, 2), num_inference_steps=200))
    assert engine.stepping.wait(TIMEOUT_S)
    engine.gate.set()
    state = refused.result(TIMEOUT_S).state
    assert state.failure is not None
    assert (state.failure.reason, state.failure.param) == (FailureReason.INVALID_REQUEST, "prompt")
    assert len(engine.batches) < 200
    assert service.submit(make_job("next", seeds=(3,))).result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED


def test_time_of_a_shared_device_is_charged_and_that_of_another_is_not(
    service: Any, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent: list[float] = []
    precedence = service.dispatcher.worker._precedence
    monkeypatch.setattr(precedence, "spend", lambda is_high, seconds, **_: spent.append(seconds))
    for is_shared in (True, False):
        monkeypatch.setattr(engine, "encodes_on_device", lambda model, is_shared=is_shared: is_shared)
        service.submit(make_job(f"job {is_shared}", seeds=(1, 2))).result(TIMEOUT_S)
    # The card says that encoding takes no time, and no step takes none
    assert spent.count(0.0) == 1


def test_nothing_of_a_job_is_left_once_all_its_images_run(service: Any, engine: Any, make_job: MakeJob) -> None:
    engine.gate.clear()
    waiting = service.submit(make_job("a", seeds=(1, 2)))
    assert engine.stepping.wait(TIMEOUT_S)
    wait_until(lambda: len(engine.encoded) == 2)
    held = service.dispatcher.worker._held["a"]
    engine.gate.set()
    waiting.result(TIMEOUT_S)
    assert (held.branches, held.encoding) == (None, {})
