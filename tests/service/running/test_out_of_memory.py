"""The service when the device runs out of memory, and when the device is lost."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from threading import Event
from typing import Any

import pytest

from models.card import ModelCard
from models.errors import DeviceLost, OutOfDeviceMemory
from models.memory import RequestMemory
from service.jobs.job import FailureReason, Job, JobStatus
from service.settings import Settings
from tests.fixtures.waiting import wait_until

StartService = Callable[[Settings], Any]
MakeJob = Callable[..., Job]
TIMEOUT_S = 20
HINT = "; try size 48x48 or less"
NO_MEMORY = OutOfDeviceMemory("it takes 9.0 GiB more than the device has")


class Failing:
    """Calls of an engine's method, of which the first `count` fail. `num_calls` counts all."""

    def __init__(self, function: Callable[..., Any], error: Exception, count: int = 1) -> None:
        self.function, self.error, self.count, self.num_calls = function, error, count, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.num_calls += 1
        if self.num_calls <= self.count:
            raise self.error
        return self.function(*arguments, **options)


def seeds_of(states: Sequence[Any]) -> list[int]:
    return sorted(state.request.seed for state in states)


def test_batch_that_needs_too_much_memory_goes_on_in_halves(
    service: Any, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, tried = engine.step, []

    def step_two_at_most(states: Sequence[Any]) -> Any:
        tried.append(len(states))
        if len(states) > 2:
            raise NO_MEMORY
        return step(states)

    monkeypatch.setattr(engine, "step", step_two_at_most)
    engine.gate.clear()
    job = service.submit(make_job("a", seeds=range(4), num_inference_steps=10))
    wait_until(lambda: len(engine.encoded) == 4)
    engine.gate.set()
    assert job.result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED
    # What failed is not tried again before a request has left.
    first = tried.index(4)
    assert tried[first : first + 3] == [4, 2, 2]
    assert sum(count > 2 for count in tried) <= 3
    assert len(tried) <= 4 + 20


def test_only_who_needs_too_much_memory_alone_fails(
    service: Any, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, failed = engine.step, []

    def step_without_three(states: Sequence[Any]) -> Any:
        if 3 in seeds_of(states):
            failed.append(seeds_of(states))
            raise NO_MEMORY
        return step(states)

    monkeypatch.setattr(engine, "step", step_without_three)
    engine.gate.clear()
    first = service.submit(make_job("first", seeds=(1,)))
    assert engine.stepping.wait(TIMEOUT_S)
    others = [service.submit(make_job(name, seeds=(seed,))) for name, seed in (("two", 2), ("three", 3), ("four", 4))]
    service.wait_until_taken("first", "two", "three", "four")
    engine.gate.set()
    two, three, four = (job.result(TIMEOUT_S) for job in others)
    assert {job.state.status for job in (first.result(TIMEOUT_S), two, four)} == {JobStatus.SUCCEEDED}
    assert three.state.failure.message == f"job three failed: {NO_MEMORY}{HINT}"
    assert failed == [[1, 2, 3, 4], [3, 4], [3], [3]]  # alone among others, then without them


@pytest.mark.parametrize("stage", ["encode", "start", "step", "finish"])
def test_what_runs_out_of_memory_is_tried_again(
    stage: str, service: Any, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = Failing(getattr(engine, stage), NO_MEMORY)
    monkeypatch.setattr(engine, stage, failing)
    assert service.submit(make_job("a")).result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED
    assert failing.num_calls > 1
    monkeypatch.setattr(engine, stage, Failing(failing.function, NO_MEMORY, count=2))
    failure = service.submit(make_job("b")).result(TIMEOUT_S).state.failure
    assert failure.message == f"job b failed: {NO_MEMORY}{HINT}"


def test_decoding_that_runs_out_of_memory_waits_until_no_step_runs(
    service: Any, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, step, is_stepping, has_failed = engine.finish, engine.step, Event(), Event()
    seen: list[bool] = []

    def step_slowly(states: Sequence[Any]) -> Any:
        is_stepping.set()
        if 1 not in seeds_of(states):  # the decoding of 1 has begun in the other thread
            assert has_failed.wait(TIMEOUT_S)
        try:
            return step(states)
        finally:
            is_stepping.clear()

    def finish_alone(state: Any) -> Any:
        if state.request.seed == 1 and not has_failed.is_set():
            assert is_stepping.wait(TIMEOUT_S)
            has_failed.set()
            raise NO_MEMORY
        seen.append(is_stepping.is_set())
        return finish(state)

    monkeypatch.setattr(engine, "step", step_slowly)
    monkeypatch.setattr(engine, "finish", finish_alone)
    jobs = [make_job("a", seeds=(1,), num_inference_steps=1), make_job("b", seeds=(2,), num_inference_steps=50)]
    for job in [service.submit(job) for job in jobs]:
        assert job.result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED
    assert seen[0] is False


def test_preview_that_runs_out_of_memory_is_left_out(
    service: Any, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preview(state: Any) -> Callable[[], Any]:
        def fail() -> Any:
            raise NO_MEMORY

        return fail

    monkeypatch.setattr(engine, "preview", preview)
    assert service.submit(replace(make_job("a"), num_previews=2)).result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED


def test_mesh_that_runs_out_of_memory_between_turns_is_decoded_again(
    service: Any, engine: Any, make_mesh_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.has_fields = True
    engine.field_gate.set()
    field, begun = engine._field, []
    uses: list[tuple[int, int]] = []
    publisher, memory = service.dispatcher.worker._publisher, RequestMemory(finished=1, decode=20, grid=300)
    monkeypatch.setattr(publisher, "_note_use", lambda use: uses.append((use.held, use.peak)))
    monkeypatch.setattr(ModelCard, "memory_of", lambda *_: memory)

    def fail_once(state: Any) -> Any:
        begun.append(state.request.seed)
        if len(begun) == 1:
            yield
            raise NO_MEMORY
        return (yield from field(state))

    monkeypatch.setattr(engine, "_field", fail_once)
    assert service.submit(make_mesh_job("mesh")).result(TIMEOUT_S).state.status is JobStatus.SUCCEEDED
    assert len(begun) == 2
    assert uses == [(301, 20)]  # what it takes of the device beside the steps of others


@pytest.mark.parametrize("stage", ["encode", "start", "step", "finish", "preview"])
def test_lost_device_ends_the_worker_and_nothing_is_the_jobs_fault(
    stage: str, service: Any, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> Any:
        raise DeviceLost("the device is lost: an illegal memory access was encountered")

    monkeypatch.setattr(engine, "finish", fail)
    monkeypatch.setattr(engine, stage, (lambda _: fail) if stage == "preview" else fail)
    failure = service.submit(replace(make_job("a", seeds=(1, 2)), num_previews=1)).result(TIMEOUT_S).state.failure
    assert failure.reason is FailureReason.DRAINING
    assert failure.message == "the server had to restart before job a was finished"
    assert service.dispatcher.is_broken


def test_jobs_of_a_lost_device_return_to_the_queue(
    service: Any, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were running count as having met a dead worker, so that one that kills all cannot go on for ever."""
    monkeypatch.setattr(type(service.store), "is_shared", True)

    def fail(*_: object) -> Any:
        engine.stepping.set()
        assert engine.gate.wait(TIMEOUT_S)
        raise DeviceLost("the device is lost")

    monkeypatch.setattr(engine, "step", fail)
    starter = service.dispatcher.worker._starter
    claim_place = starter._claim_place
    monkeypatch.setattr(
        starter, "_claim_place", lambda held, index: held.job.id != "innocent" and claim_place(held, index)
    )
    engine.gate.clear()
    service.run(service.store.add(make_job("suspect")))
    assert engine.stepping.wait(TIMEOUT_S)
    service.run(service.store.add(make_job("innocent")))
    service.wait_until_taken("suspect", "innocent")
    engine.gate.set()
    service.run(asyncio.wait_for(service.dispatcher.has_drained.wait(), TIMEOUT_S))
    states = [service.get(job_id).state for job_id in ("suspect", "innocent")]
    assert [(state.status, state.attempts) for state in states] == [(JobStatus.RUNNING, 1), (JobStatus.QUEUED, 0)]


def test_jobs_that_wait_to_be_encoded_when_the_device_is_lost_are_no_suspects(
    service: Any, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(service.store), "is_shared", True)
    worker, encode = service.dispatcher.worker, engine.encode

    def encode_and_lose(request: Any, branches: Any) -> Any:
        encode(request, branches)
        raise DeviceLost("the device is lost")

    monkeypatch.setattr(engine, "encode", encode_and_lose)
    engine.encoding_gate.clear()
    service.run(service.store.add(make_job("suspect")))
    assert engine.encoding.wait(TIMEOUT_S)
    service.run(service.store.add(make_job("innocent")))
    service.wait_until_taken("suspect", "innocent", are_encoded=False)
    worker._stop_without_device(DeviceLost("the device is lost"))
    wait_until(lambda: worker._starter._encoder._is_closed)
    engine.encoding_gate.set()
    service.run(asyncio.wait_for(service.dispatcher.has_drained.wait(), TIMEOUT_S))
    states = [service.get(job_id).state for job_id in ("suspect", "innocent")]
    assert [(state.status, state.attempts) for state in states] == [(JobStatus.RUNNING, 1), (JobStatus.QUEUED, 0)]
