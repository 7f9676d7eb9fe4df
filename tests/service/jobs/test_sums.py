"""The sums that Redis' scripts keep, compared with the records: after random changes, kills and repeated calls."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from benchmarks.processes import RedisServer
from service.jobs.job import Job, JobStatus, Priority
from service.jobs.redis import RedisStore
from service.jobs.redis_operations import connect
from service.jobs.results import MemoryResults
from service.jobs.shared_clock import SharedClock
from service.jobs.store import Claim, Ending, Fit, Progress
from service.order import input_image_bytes
from service.scheduling.fleet import Load, ModelLoad
from tests.fixtures.job_records import MESH

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

OWNERS = ("a", "b")
LEASE_S = 1.0
_prefixes = itertools.count()


@pytest.fixture
async def stores(redis_server: RedisServer) -> AsyncIterator[list[RedisStore]]:
    """Those of three workers. The last one sends each script twice, as if the first answer had been lost."""
    prefix, stores = f"sums{next(_prefixes)}:", []
    for _ in range(3):
        stores.append(
            RedisStore(
                connect(redis_server.url),
                MemoryResults(ttl_s=60.0, max_bytes=10**6, clock=lambda: 0.0),
                job_ttl_s=600.0,
                events_ttl_s=600.0,
                lease_s=LEASE_S,
                max_attempts=3,
                clock=SharedClock(lambda: 0.0),
                on_error=pytest.fail,
                prefix=prefix,
            )
        )
    redis: Any = stores[-1]._redis
    while (await redis.info("server"))["uptime_in_seconds"] < LEASE_S:  # else nothing is recovered
        await asyncio.sleep(0.1)
    call_once = redis.evalsha

    async def call_twice(*arguments: Any) -> Any:
        await call_once(*arguments)
        return await call_once(*arguments)

    redis.evalsha = call_twice
    yield stores
    for store in stores:
        await store.close()


async def counted_again(store: RedisStore, jobs: list[Job], owner: str) -> Load:
    """The load by the records of these jobs."""
    models: dict[str, ModelLoad] = {}
    image_bytes, own_s, owners = 0, 0.0, set()
    for job in jobs:
        snapshot = await store.get(job.id)
        if snapshot.state.status.is_terminal:
            continue
        seconds = round(snapshot.remaining_seconds, 6)
        of_model = models.get(job.model, ModelLoad())
        is_queued = snapshot.state.status is JobStatus.QUEUED
        models[job.model] = ModelLoad(
            of_model.num_queued + is_queued,
            of_model.num_running + (not is_queued),
            of_model.queued_s + seconds * is_queued,
            of_model.running_s + seconds * (not is_queued),
            of_model.urgent_s + seconds * job.is_urgent,
        )
        image_bytes += input_image_bytes(job.requests)
        own_s += seconds * (job.owner == owner)
        owners.add(job.owner)
    return Load(models, image_bytes, own_s, len(owners))


def rounded(load: Load) -> Load:
    models = {
        model: replace(
            of, queued_s=round(of.queued_s, 5), running_s=round(of.running_s, 5), urgent_s=round(of.urgent_s, 5)
        )
        for model, of in load.models.items()
    }
    return replace(load, models=models, own_s=round(load.own_s, 5))


@pytest.mark.parametrize("seed", range(4))
async def test_sums_are_those_of_the_records(seed: int, stores: list[RedisStore], make_job: Callable[..., Job]) -> None:
    draw, jobs, claims = Random(seed), list[Job](), list[tuple[RedisStore, Claim]]()
    for number in range(150):
        store = draw.choice(stores)
        match draw.choice(["add", "add", "claim", "claim", "record", "end", "release", "cancel", "kill"]):
            case "add":
                job = make_job(f"job{number}", width=draw.choice([64, 128]), priority=draw.choice([*Priority]))
                if draw.random() < 0.3:
                    job = replace(job, model=MESH.model, requests=(MESH,))
                deadline_at = 1e9 if draw.random() < 0.3 else None
                seconds = draw.randrange(60, 600, 60) / 100  # which may be cut into 1 to 5 steps
                jobs.append(replace(job, predicted_seconds=seconds, owner=draw.choice(OWNERS), deadline_at=deadline_at))
                await store.add(jobs[-1])
            case "claim":
                if claim := await store.claim(lambda _: Fit.NOW):
                    claims.append((store, claim))
            case "record" if claims:
                store, claim = draw.choice(claims)
                num_steps = draw.randint(1, 5)
                await store.record(Progress(claim, draw.randint(0, num_steps), num_steps, 0.5, 1.0))
            case "end" if claims:
                store, claim = claims.pop(draw.randrange(len(claims)))
                await store.end(Ending(claim, JobStatus.SUCCEEDED, artifacts=(b"image",)))
            case "release" if claims:
                store, claim = claims.pop(draw.randrange(len(claims)))
                await store.release(claim)
            case "cancel" if jobs:
                await store.cancel(draw.choice(jobs).id)
            case "kill" if claims:  # the worker of a claim dies, and its lease runs out; another one clears up
                _, claim = draw.choice(claims)
                await stores[0]._redis.zadd(stores[0]._key("leases"), {claim.job.id: 1}, xx=True)
                await store.recover()
        if number % 5 == 0:
            owner = draw.choice(OWNERS)
            found = await stores[0].load(owner)
            again = await counted_again(stores[0], jobs, owner)
            assert rounded(found) == rounded(again)
    assert len(jobs) > 20
    for job in jobs:
        await stores[0].cancel(job.id)
    assert await stores[0].load() == Load()


async def test_what_another_version_left_in_the_sums_is_gone_once_no_job_is_counted(
    stores: list[RedisStore], make_job: Callable[..., Job]
) -> None:
    store, redis = stores[0], stores[0]._redis
    await store.add(replace(make_job("a"), deadline_at=1e9))
    await redis.hincrby(store._key("load"), "urgent_us:drawn", 5_000_000)
    await store.recover()
    assert (await store.load()).of("drawn").urgent_s == 7.0
    await store.cancel("a")
    await store.recover()
    assert await store.load() == Load()
