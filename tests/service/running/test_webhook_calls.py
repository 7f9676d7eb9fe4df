"""The webhooks of ended jobs, taken from a store and called by a function of the test."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from service.errors import StoreUnavailable
from service.jobs.job import Job, JobSnapshot
from service.jobs.memory import MemoryStore
from service.jobs.results import MemoryResults
from service.running.webhook_calls import WebhookCalls

MakeJob = Callable[..., Job]
TIMEOUT_S = 60


@pytest.fixture
def now() -> list[float]:
    return [0.0]


@pytest.fixture
def store(now: list[float], monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A store whose clock is `now`, polled quickly."""
    monkeypatch.setattr("service.running.webhook_calls.POLL_S", 0.001)
    results = MemoryResults(ttl_s=60.0, max_bytes=1_000_000, clock=lambda: now[0])
    return MemoryStore(results, job_ttl_s=1e5, events_ttl_s=60.0, lease_s=15.0, max_attempts=2, clock=lambda: now[0])


async def end(store: MemoryStore, *jobs: Job, host: str = "hooks.example") -> None:
    """End jobs with a webhook at `host`."""
    for job in jobs:
        await store.add(replace(job, webhook_url=f"https://{host}/"))
        await store.cancel(job.id)


@asynccontextmanager
async def calling(store: MemoryStore, deliver: Callable[[JobSnapshot], Awaitable[bool]]) -> AsyncIterator[None]:
    task = asyncio.create_task(WebhookCalls(store, deliver).run())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(is_true: Callable[[], bool]) -> None:
    while not is_true():
        await asyncio.sleep(0.001)


@pytest.mark.anyio
async def test_webhook_is_called_again_until_it_succeeds_or_is_given_up(
    store: MemoryStore, now: list[float], make_job: MakeJob
) -> None:
    calls: list[tuple[str, float]] = []

    async def deliver(snapshot: JobSnapshot) -> bool:
        calls.append((snapshot.job.id, now[0]))
        return snapshot.job.id == "second try" and now[0] > 0

    await end(store, make_job("never"), make_job("second try"))
    async with calling(store, deliver):
        await until(lambda: len(calls) == 2)
        for delay_s, num_calls in ((1, 4), (5, 5), (30, 6), (120, 7), (600, 8)):
            now[0] += delay_s
            await until(lambda expected=num_calls: len(calls) == expected)  # type: ignore[misc]
        now[0] += 10_000
        await asyncio.sleep(0.01)
    assert [at for job_id, at in calls if job_id == "never"] == [0, 1, 6, 36, 156, 756]
    assert [at for job_id, at in calls if job_id == "second try"] == [0, 1]


@pytest.mark.anyio
async def test_webhook_whose_last_caller_died_is_called_once_more_and_given_up(
    store: MemoryStore, now: list[float], make_job: MakeJob
) -> None:
    await end(store, make_job("a"))
    for _ in range(7):  # more calls than there are delays
        assert await store.take_webhook() is not None
        now[0] += 100

    async def deliver(snapshot: JobSnapshot) -> bool:
        called.set()
        return False

    called = asyncio.Event()
    async with calling(store, deliver):
        await called.wait()
        await asyncio.sleep(0.01)
        now[0] += 10_000
        assert await store.take_webhook() is None


@pytest.mark.anyio
async def test_error_of_one_webhook_leaves_the_others_alone(
    store: MemoryStore, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Given calls, a result that cannot be stored, and a record that cannot be read, which all fail once
    failed: set[str] = set()
    called: list[str] = []
    settle, take = store.settle_webhook, store.take_webhook

    def fail_once(what: str, error: Exception) -> None:
        if what not in failed:
            failed.add(what)
            raise error

    async def deliver(snapshot: JobSnapshot) -> bool:
        fail_once("deliver", ZeroDivisionError())
        called.append(snapshot.job.id)
        return True

    async def settle_webhook(job_id: str, retry_in_s: float | None) -> None:
        fail_once("settle", StoreUnavailable("away"))
        await settle(job_id, retry_in_s)

    async def take_webhook() -> tuple[JobSnapshot, int] | None:
        fail_once("take", ValueError("no job"))
        return await take()

    monkeypatch.setattr(store, "settle_webhook", settle_webhook)
    monkeypatch.setattr(store, "take_webhook", take_webhook)
    await end(store, *(make_job(name) for name in "abc"))
    with caplog.at_level(logging.WARNING):
        async with calling(store, deliver):
            await until(lambda: called == ["b", "c"])
    assert failed == {"deliver", "settle", "take"}


@pytest.mark.anyio
async def test_slow_host_holds_up_no_other(
    store: MemoryStore, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: Counter[str] = Counter()
    most: Counter[str] = Counter()
    monkeypatch.setattr("service.running.webhook_calls.MAX_CALLS_PER_HOST", 3)

    async def deliver(snapshot: JobSnapshot) -> bool:
        host = snapshot.job.webhook_url or ""
        running[host] += 1
        most[host] = max(most[host], running[host])
        if "slow" in host:
            await asyncio.Event().wait()
        return True

    await end(store, *(make_job(f"slow {number}") for number in range(20)), host="slow.example")
    await end(store, make_job("a"))
    async with calling(store, deliver):
        await until(lambda: running["https://hooks.example/"] == 1)
    assert most["https://slow.example/"] == 3


@pytest.mark.anyio
async def test_webhooks_that_wait_for_a_slow_host_make_room_for_others(
    store: MemoryStore, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.running.webhook_calls.MAX_CALLS", 2)
    monkeypatch.setattr("service.running.webhook_calls.MAX_CALLS_PER_HOST", 1)
    monkeypatch.setattr("service.running.webhook_calls.MAX_WAIT_S", 0.01)
    called: list[str] = []

    async def deliver(snapshot: JobSnapshot) -> bool:
        called.append(snapshot.job.id)
        if snapshot.job.id != "a":
            await asyncio.Event().wait()
        return True

    await end(store, *(make_job(name) for name in ("slow", "late")), host="slow.example")
    await end(store, make_job("a"))
    async with calling(store, deliver):
        await until(lambda: called == ["slow", "a"])
