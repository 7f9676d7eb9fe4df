"""All job stores and results stores: each is tested for the contract."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import RedisServer
from service.jobs.memory import MemoryStore
from service.jobs.redis import RedisStore
from service.jobs.redis_operations import connect
from service.jobs.results import MemoryResults, RedisResults, Results, VolumeResults
from service.jobs.shared_clock import SharedClock
from service.jobs.store import JobStore

LEASE_S, JOB_TTL_S, RESULT_TTL_S, MAX_BYTES = 0.3, 1.0, 0.5, 100
_names = itertools.count()


@dataclass
class Bench:
    """A store under test. `elapse` lets time pass: that of a fake clock, or real time where Redis keeps the clock.

    `queued` is set when a job joins the queue; `cancelled` has the ids of the cancelled jobs that the store announced.
    """

    store: JobStore
    results: Results
    elapse: Callable[[float], Awaitable[None]]
    queued: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Queue[str] = field(default_factory=asyncio.Queue)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now

    async def elapse(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(params=["memory", "volume", pytest.param("redis", marks=pytest.mark.redis)])
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    clock = Clock()
    limits: dict[str, Any] = {"ttl_s": RESULT_TTL_S, "max_bytes": MAX_BYTES}
    rules: dict[str, Any] = {
        "job_ttl_s": JOB_TTL_S,
        "events_ttl_s": RESULT_TTL_S,
        "lease_s": LEASE_S,
        "max_attempts": 2,
        "clock": clock,
    }
    store: JobStore
    results: Results
    elapse: Callable[[float], Awaitable[None]]
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        prefix, redis = f"test{next(_names)}:", connect(server.url)
        results = RedisResults(redis, **limits, on_error=pytest.fail, prefix=prefix)
        store = RedisStore(
            redis, results, **{**rules, "clock": SharedClock(clock)}, on_error=pytest.fail, prefix=prefix
        )
        elapse = asyncio.sleep
        while (await redis.info("server"))["uptime_in_seconds"] < LEASE_S:
            await asyncio.sleep(0.1)
    else:
        if request.param == "volume":
            results = VolumeResults(f"file://{tmp_path}/results", **limits, on_error=pytest.fail, clock=clock)
        else:
            results = MemoryResults(**limits, clock=clock)
        store = MemoryStore(results, **rules)
        elapse = clock.elapse
    bench = Bench(store, results, elapse)
    await store.open(on_queued=bench.queued.set, on_cancelled=bench.cancelled.put_nowait)
    yield bench
    await store.close()
