"""The dispatcher between a store and a worker with a drawn engine."""

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import RedisServer
from models.request import LatencyBudget
from service.app import build_dispatcher
from service.errors import Draining, StoreUnavailable
from service.jobs.job import FailureReason, Job, JobSnapshot, JobStatus
from service.jobs.memory import MemoryStore
from service.jobs.results import MemoryResults, Results, VolumeResults
from service.jobs.store import Claim, Ending, EventName, Fit, Fits, Preview, Progress, ended
from service.metrics import Metrics
from service.running.dispatcher import Dispatcher, Timing
from service.running.inbox import Inbox
from service.running.room import WorkerLimits
from service.running.worker import Worker
from service.scheduling.fleet import WorkerState
from service.settings import Settings

StartService = Callable[[Settings], Any]
MakeJob = Callable[..., Job]
Build = Callable[..., Dispatcher]
TIMEOUT_S = 60


class FragileStore(MemoryStore):
    """A store that cannot be reached while `is_away`.

    `num_refused` counts the calls that failed, `num_claims` the attempts to claim a job.
    """

    def __init__(self, results: Results | None = None, **options: Any) -> None:
        results = results or MemoryResults(ttl_s=60.0, max_bytes=1_000_000, clock=time.time)
        rules = {"job_ttl_s": 60.0, "events_ttl_s": 60.0, "lease_s": 15.0, "max_attempts": 2, "clock": time.time}
        super().__init__(results, **{**rules, **options})
        self.is_away = False
        self.num_refused = 0
        self.num_claims = 0

    async def claim(self, fits: Fits) -> Claim | None:
        self.num_claims += 1
        return await super().claim(fits)

    def _check(self) -> None:
        if self.is_away:
            self.num_refused += 1
            raise StoreUnavailable("the store is away")

    async def record(self, progress: Progress) -> None:
        self._check()
        await super().record(progress)

    async def add_preview(self, preview: Preview) -> None:
        self._check()
        await super().add_preview(preview)

    async def end(self, ending: Ending) -> JobSnapshot | None:
        self._check()
        return await super().end(ending)

    async def cancel(self, job_id: str) -> tuple[JobSnapshot, bool]:
        self._check()
        return await super().cancel(job_id)


FullVolume = tuple[VolumeResults, ExitStack, list[str]]


@pytest.fixture
def full_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FullVolume]:
    """A volume without room until the stack is closed, and the names of the operations that failed."""
    errors: list[str] = []
    results = VolumeResults(
        f"file://{tmp_path}", ttl_s=60.0, max_bytes=1_000_000, on_error=errors.append, clock=time.time
    )
    write = results._files.pipe_file

    def write_half(path: str, data: bytes) -> None:
        write(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", path)

    with ExitStack() as room, monkeypatch.context() as patched:
        patched.setattr(results._files, "pipe_file", write_half)
        room.callback(patched.undo)
        yield results, room, errors


class SharedStore(FragileStore):
    """A store that outlives the process."""

    is_shared = True


@pytest.fixture
def build(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Build:
    """A dispatcher around a store, with a worker that has been started; it retries and polls quickly."""
    monkeypatch.setattr("service.running.dispatcher.RETRY_S", 0.01)
    monkeypatch.setattr("service.running.reports.RETRY_S", 0.01)
    monkeypatch.setattr("service.running.dispatcher.POLL_S", 0.01)

    def build(
        store: MemoryStore,
        *,
        max_running: int = 16,
        grace_s: float = 20.0,
        lease_s: float = 15.0,
        deliver_webhook: Callable[[JobSnapshot], Awaitable[bool]] | None = None,
    ) -> Dispatcher:
        metrics, inbox = Metrics(), Inbox()
        limits = WorkerLimits(max_batch_size=4, max_running=max_running, max_decode_bytes=10**9)
        worker = Worker(lambda: engine, metrics, limits, report=inbox.report, on_room=inbox.wake)
        worker.start()
        timing = Timing(lease_s=lease_s, grace_s=grace_s)
        return Dispatcher(store, worker, inbox, metrics, timing, clock=time.time, deliver_webhook=deliver_webhook)

    return build


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not is_true():
            await asyncio.sleep(0.001)


async def status_at_end(store: MemoryStore, job_id: str) -> JobStatus:
    async with asyncio.timeout(TIMEOUT_S):
        return (await ended(store, job_id)).state.status


def held_ids(dispatcher: Dispatcher) -> set[str]:
    return {claim.job.id for claim in dispatcher.worker.held()}


def line_of(dispatcher: Dispatcher, name: str) -> str:
    """The value of a series, by its name and labels."""
    page = dispatcher.metrics.exposition({}).decode()
    return next(line.rpartition(" ")[2] for line in page.splitlines() if line.startswith(name + " "))


@pytest.mark.anyio
async def test_only_jobs_that_the_worker_has_room_for_are_claimed(build: Build, engine: Any, make_job: MakeJob) -> None:
    store = FragileStore()
    dispatcher = build(store, max_running=1)
    engine.gate.clear()
    async with dispatcher.running():
        for name in ("a", "b"):
            await store.add(make_job(name))
        await until(lambda: held_ids(dispatcher) == {"a"})
        assert dispatcher.num_running() == {"drawn": 1}
        assert (await store.load()).of("drawn").num_queued == 1
        num_claims = store.num_claims
        for _ in range(3):  # polls pass: a full worker does not ask the store
            await asyncio.sleep(0.02)
        assert store.num_claims == num_claims
        engine.gate.set()
        assert await status_at_end(store, "b") is JobStatus.SUCCEEDED


@pytest.mark.anyio
async def test_worker_is_announced_as_busy_with_its_first_job(build: Build, engine: Any, make_job: MakeJob) -> None:
    store = FragileStore()
    dispatcher = build(store, lease_s=100 * TIMEOUT_S)  # which is how rarely it says so otherwise
    engine.gate.clear()

    async def wait_for(state: WorkerState) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while [record.state for record in await store.workers()] != [state]:
                await asyncio.sleep(0.001)

    async with dispatcher.running():
        await wait_for(WorkerState.IDLE)
        await store.add(make_job("a"))
        await wait_for(WorkerState.BUSY)
        engine.gate.set()


@pytest.mark.anyio
async def test_end_is_stored_when_the_store_returns(build: Build, engine: Any, make_job: MakeJob) -> None:
    store = FragileStore()
    dispatcher = build(store)
    engine.gate.clear()
    async with dispatcher.running():
        await store.add(make_job("a"))
        await until(engine.stepping.is_set)
        # When the store is away while the job is finished
        store.is_away = True
        engine.gate.set()
        await until(lambda: store.num_refused > 8)  # more than progress alone can cause
        assert (await store.get("a")).state.status is JobStatus.RUNNING
        store.is_away = False
        # Then its end is stored afterwards, and progress that could not be stored is missing
        assert await status_at_end(store, "a") is JobStatus.SUCCEEDED
        assert EventName.PROGRESS not in [event.name for event in await store.events("a", "0-0")]


@pytest.mark.anyio
async def test_disconnected_clients_job_is_cancelled_when_the_store_returns(
    build: Build, engine: Any, make_job: MakeJob
) -> None:
    store = FragileStore()
    dispatcher = build(store)
    engine.gate.clear()
    async with dispatcher.running():
        await store.add(make_job("a"))
        await until(engine.stepping.is_set)
        store.is_away = True
        dispatcher.cancel_soon("a")
        assert held_ids(dispatcher) == set()  # at once, without the store
        await until(lambda: store.num_refused > 1)
        store.is_away = False
        assert await status_at_end(store, "a") is JobStatus.CANCELLED
        engine.gate.set()
    assert line_of(dispatcher, 'elastic_requests_total{model="drawn",status="cancelled"}') == "1.0"


@pytest.mark.anyio
async def test_job_that_another_process_cancels_leaves_the_worker(build: Build, engine: Any, make_job: MakeJob) -> None:
    store = FragileStore()
    dispatcher = build(store)
    engine.gate.clear()
    async with dispatcher.running():
        await store.add(make_job("a", num_inference_steps=50))
        await until(engine.stepping.is_set)
        await store.cancel("a")  # not by this dispatcher
        assert held_ids(dispatcher) == set()
        engine.gate.set()
    assert len(engine.batches) == 1


@pytest.mark.anyio
async def test_job_whose_lease_is_lost_leaves_the_worker(build: Build, engine: Any, make_job: MakeJob) -> None:
    store = SharedStore()  # whose other jobs draining does not wait for
    dispatcher = build(store, lease_s=0.04)
    engine.gate.clear()
    async with dispatcher.running():
        await store.add(make_job("a"))
        await until(engine.stepping.is_set)
        (claim,) = dispatcher.worker.held()
        await store.release(claim)
        taken = await store.claim(lambda _: Fit.NOW)  # by another worker
        assert taken is not None
        await until(lambda: claim not in dispatcher.worker.held())
        engine.gate.set()
        assert (await store.get("a")).state.status is JobStatus.RUNNING


@pytest.mark.anyio
async def test_jobs_of_a_dead_worker_are_finished_or_given_up(build: Build, make_job: MakeJob) -> None:
    # Given a job that two workers died of, and one that one worker died of
    now = [0.0]
    store = FragileStore(clock=lambda: now[0])

    async def claim_and_die(job_id: str) -> None:
        claimed = await store.claim(lambda _: Fit.NOW)
        assert claimed is not None
        assert claimed.job.id == job_id
        now[0] += 20.0  # longer than a lease

    await store.add(make_job("twice"))
    await claim_and_die("twice")
    assert (await store.recover()).requeued == ("twice",)
    await claim_and_die("twice")
    await store.add(make_job("once"))
    await claim_and_die("once")
    dispatcher = build(store)
    async with dispatcher.running():
        # Then the first fails, and the second is finished after all
        assert await status_at_end(store, "twice") is JobStatus.FAILED
        assert await status_at_end(store, "once") is JobStatus.SUCCEEDED
    failure = (await store.get("twice")).state.failure
    assert failure is not None
    assert failure.reason is FailureReason.WORKER_LOST
    assert line_of(dispatcher, "elastic_jobs_recovered_total") == "1.0"
    assert line_of(dispatcher, 'elastic_requests_total{model="drawn",status="failed"}') == "1.0"


@pytest.mark.anyio
async def test_draining_returns_unfinished_jobs_to_a_shared_store(build: Build, engine: Any, make_job: MakeJob) -> None:
    store = SharedStore()
    dispatcher = build(store, grace_s=0.0)
    engine.gate.clear()
    async with dispatcher.running():
        await store.add(make_job("a"))
        await until(engine.stepping.is_set)
        draining = asyncio.create_task(dispatcher.drain())
        await until(lambda: not dispatcher.worker.held())
        engine.gate.set()
        await draining
        state = (await store.get("a")).state
        assert (state.status, state.attempts) == (JobStatus.QUEUED, 0)


@pytest.mark.anyio
async def test_draining_server_claims_nothing_more_from_a_shared_store(build: Build, make_job: MakeJob) -> None:
    store = SharedStore()
    dispatcher = build(store)
    async with dispatcher.running():
        await dispatcher.drain()
        await store.add(make_job("a"))
    assert (await store.get("a")).state.status is JobStatus.QUEUED


@pytest.mark.anyio
@pytest.mark.parametrize("operation", ["claim", "close"])
async def test_lost_cancellation_does_not_block_the_end(
    operation: str, build: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """redis-py may lose one that comes together with an answer."""
    monkeypatch.setattr("service.running.dispatcher.LAST_STEP_S", 0.2)
    store = SharedStore()

    async def wait_through_a_cancellation(*_: object) -> None:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        if operation == "claim":
            await asyncio.Event().wait()

    monkeypatch.setattr(store, operation, wait_through_a_cancellation)
    async with asyncio.timeout(TIMEOUT_S), build(store).running():
        await asyncio.sleep(0)
    assert "does not" in caplog.text


def test_draining_finishes_running_and_queued_jobs_and_refuses_new_ones(
    start_service: StartService, engine: Any, make_job: MakeJob
) -> None:
    service = start_service(Settings(max_batch_size=1, grace_s=20))
    engine.gate.clear()
    waiting = [service.submit(make_job("a")), service.submit(make_job("b"))]
    service.drain_soon()
    with pytest.raises(Draining) as caught:
        service.dispatcher.check_accepting()
    assert caught.value.retry_after_s == 20
    engine.gate.set()
    service.drain()
    assert not service.dispatcher.worker.is_alive
    assert [finished.result(TIMEOUT_S).state.status for finished in waiting] == ["succeeded", "succeeded"]


def test_jobs_unfinished_after_the_grace_period_fail_as_draining(
    start_service: StartService, engine: Any, make_job: MakeJob
) -> None:
    service = start_service(Settings(max_batch_size=1, grace_s=0))
    engine.gate.clear()
    waiting = [service.submit(make_job("a")), service.submit(make_job("b"))]
    assert engine.stepping.wait(TIMEOUT_S)
    service.drain_soon()
    engine.gate.set()
    for finished in waiting:
        failure = finished.result(TIMEOUT_S).state.failure
        assert failure is not None
        assert failure.reason is FailureReason.DRAINING


def test_step_that_never_ends_does_not_block_draining(
    start_service: StartService, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.running.dispatcher.LAST_STEP_S", 0.2)
    service = start_service(Settings(grace_s=0))
    engine.gate.clear()
    finished = service.submit(make_job("a"))
    assert engine.stepping.wait(TIMEOUT_S)
    service.drain()
    assert finished.result(TIMEOUT_S).state.status is JobStatus.FAILED


def test_bug_in_the_worker_fails_all_jobs_and_drains(
    service: Any, engine: Any, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "memory_bytes", lambda: 1 / 0)
    assert service.submit(make_job("a")).result(TIMEOUT_S).state.status is JobStatus.FAILED
    service.drain()
    with pytest.raises(Draining):
        service.dispatcher.check_accepting()
    assert "the worker stopped" in caplog.text


def test_one_line_for_each_ended_job_without_its_prompt(
    service: Any, make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        service.submit(make_job("a", prompt="my secret wish")).result(TIMEOUT_S)
        service.drain()
    lines = [record.getMessage() for record in caplog.records if getattr(record, "job_id", None) == "a"]
    assert len(lines) == 1
    assert "status=succeeded" in lines[0]
    assert "wish" not in caplog.text
    assert lines[0].startswith("job ended")


def test_bug_in_the_dispatcher_fails_all_jobs_and_drains(
    start_service: StartService, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    service = start_service(Settings(grace_s=0.2))
    monkeypatch.setattr(service.store, "claim", lambda fits: 1 / 0)
    assert service.submit(make_job("a")).result(TIMEOUT_S).state.status is JobStatus.FAILED
    assert "the dispatcher stopped" in caplog.text
    with pytest.raises(Draining):
        service.dispatcher.check_accepting()


@pytest.mark.anyio
async def test_end_that_breaks_the_store_is_that_jobs_alone(
    build: Build, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = FragileStore()
    end = store.end

    async def break_at_a(ending: Ending) -> JobSnapshot | None:
        if ending.claim.job.id == "a":
            raise KeyError("content")
        return await end(ending)

    monkeypatch.setattr(store, "end", break_at_a)
    dispatcher = build(store, grace_s=0.0)
    async with dispatcher.running():
        for name in ("a", "b"):
            await store.add(make_job(name))
        assert await status_at_end(store, "b") is JobStatus.SUCCEEDED
        await until(lambda: "can't be stored" in caplog.text)
        dispatcher.check_accepting()


@pytest.mark.anyio
async def test_results_wait_until_their_volume_has_room_and_no_more_are_made(
    build: Build, make_job: MakeJob, full_volume: FullVolume, tmp_path: Path
) -> None:
    results, room, errors = full_volume
    store = FragileStore(results)
    dispatcher = build(store, max_running=2)
    jobs = [f"job{number}" for number in range(6)]
    async with dispatcher.running():
        for name in jobs:
            await store.add(make_job(name))
        await until(lambda: errors.count("put_results") > 8)
        # No more work is accepted, and no more than fits is in memory
        with pytest.raises(StoreUnavailable, match="No space left on device") as refused:
            dispatcher.check_accepting()
        assert str(tmp_path) not in str(refused.value)
        with pytest.raises(StoreUnavailable, match="No space left on device"):
            await store.check()
        assert (await store.load()).of("drawn").num_queued >= 2
        await until(lambda: not list(tmp_path.iterdir()))  # between two tries nothing is left of the last one
        # When there is room again, everything is delivered
        room.close()
        for name in jobs:
            assert await status_at_end(store, name) is JobStatus.SUCCEEDED
            assert (await store.content(name)).artifacts[0]
        await until(lambda: not dispatcher.worker.held())
        dispatcher.check_accepting()
        await store.check()


@pytest.mark.anyio
async def test_result_that_cannot_be_stored_does_not_hold_up_others(
    build: Build, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FragileStore()
    end = store.end
    refused: list[str] = []

    async def refuse_a(ending: Ending) -> JobSnapshot | None:
        if ending.claim.job.id == "a":
            refused.append("a")
            raise StoreUnavailable("too large")
        return await end(ending)

    monkeypatch.setattr(store, "end", refuse_a)
    async with build(store, grace_s=0.0).running():
        for name, num_steps in (("a", 1), ("b", 50)):
            await store.add(make_job(name, num_inference_steps=num_steps))
        await until(lambda: len(refused) > 1)
        assert await status_at_end(store, "b") is JobStatus.SUCCEEDED


@pytest.mark.anyio
@pytest.mark.redis
@pytest.mark.parametrize("skew_s", [-1e6, 1e6])
async def test_worker_whose_clock_is_wrong_goes_by_the_clock_of_redis(
    skew_s: float, redis_server: RedisServer, engine: Any, make_job: MakeJob
) -> None:
    settings = Settings(redis_url=redis_server.url.replace("/0", "/7"))
    dispatcher = build_dispatcher(settings, lambda: engine, clock=lambda: time.time() + skew_s)
    dispatcher.worker.start()
    engine.gate.clear()
    async with dispatcher.running():
        await until(lambda: abs(dispatcher.store.clock() - time.time()) < 300)  # it has heard of Redis' clock
        now = dispatcher.store.clock()
        job = replace(make_job(f"skew{skew_s}", budget=LatencyBudget(600.0)), created_at=now, deadline_at=now + 600)
        await dispatcher.store.add(job)
        engine.gate.set()
        (receipt,) = (await ended(dispatcher.store, job.id)).state.receipts
    assert 0 <= receipt.seconds.queue < 300
    assert receipt.deadline_met
    assert {move.quality for move in engine.moves} == {1.0}
