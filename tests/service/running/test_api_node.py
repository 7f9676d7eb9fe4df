"""The dispatcher of an API node, which has no worker."""

import asyncio
import time
from collections.abc import Callable

import pytest

from service.errors import Draining
from service.jobs.job import Job, JobStatus
from service.jobs.memory import MemoryStore
from service.jobs.results import MemoryResults
from service.jobs.store import Fit
from service.metrics import Metrics
from service.running.dispatcher import Dispatcher, Timing
from service.running.inbox import Inbox

pytestmark = pytest.mark.anyio
MakeJob = Callable[..., Job]


def api_node(lease_s: float = 15.0, grace_s: float = 60.0) -> Dispatcher:
    results = MemoryResults(ttl_s=60.0, max_bytes=1_000_000, clock=time.time)
    store = MemoryStore(results, job_ttl_s=60.0, events_ttl_s=60.0, lease_s=lease_s, max_attempts=2, clock=time.time)
    return Dispatcher(store, None, Inbox(), Metrics(), Timing(lease_s, grace_s), clock=time.time)


async def test_jobs_are_cancelled_and_recovered_but_not_claimed(make_job: MakeJob) -> None:
    node = api_node(lease_s=0.01)
    await node.store.add(make_job("a"))
    lost = await node.store.claim(lambda kind: Fit.NOW)
    assert lost is not None
    async with node.running():
        async with asyncio.timeout(20):
            while (await node.store.get("a")).state.status is not JobStatus.QUEUED:
                await asyncio.sleep(0.01)
        assert node.num_running() == {}
        assert (await node.cancel("a")).state.status is JobStatus.CANCELLED
    assert not node.is_broken


async def test_drain_waits_for_open_calls_alone(make_job: MakeJob) -> None:
    node = api_node()
    async with node.running():
        await node.store.add(make_job("a"))  # which others run
        with node.open_call():
            draining = asyncio.create_task(node.drain())
            await asyncio.sleep(0.1)
            assert not draining.done()
            with pytest.raises(Draining):
                node.check_accepting()
        async with asyncio.timeout(20):
            await draining
        assert node.has_drained.is_set()
    assert (await node.store.get("a")).state.status is JobStatus.QUEUED


async def test_drain_gives_up_waiting_after_the_grace_period() -> None:
    node = api_node(grace_s=0.05)
    async with node.running():
        with node.open_call():
            async with asyncio.timeout(20):
                await node.drain()
