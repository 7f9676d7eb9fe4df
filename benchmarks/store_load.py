"""Workers and clients of the store's benchmark: real stores, jobs that compute nothing. Imports no torch."""

import asyncio
import itertools
import random
import time
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha1
from typing import Any

from models.card import Guidance, ImageCard, SizeLimits
from models.curve import EXACT
from models.memory import ImageMemory, RequestMemory, Values
from models.request import ImageRequest, QualityBudget
from service.errors import StoreUnavailable
from service.jobs.job import Job, JobStatus, Priority
from service.jobs.redis import RedisStore
from service.jobs.redis_claims import CLAIM
from service.jobs.redis_operations import connect
from service.jobs.redis_scripts import ADD
from service.jobs.results import MemoryResults
from service.jobs.shared_clock import SharedClock
from service.jobs.store import Claim, Ending, Fit, JobKind, Progress
from service.order import Output
from service.scheduling.fleet import WorkerRecord, WorkerState

MODEL = "model"
NUM_EVENTS = 5
"""Events of progress of each job."""
_SIDES = (512, 768, 1024, 1536)
_NUM_OWNERS = 20
_CLAIM_SHA = sha1(CLAIM.encode()).hexdigest()
_CARD = ImageCard(
    id=MODEL,
    family="flux",
    license="apache-2.0",
    created=0,
    quality_metric="ssim",
    default_num_inference_steps=4,
    default_guidance_scale=3.5,
    max_num_inference_steps=50,
    default_height=1024,
    default_width=1024,
    sizes=SizeLimits(16, 64, 2048),
    guidance=Guidance.DISTILLED,
    rules=("dense",),
    curve=(EXACT,),
    blocks=("double.00",),
    dense_step_seconds=0.2,
    fixed_share=0.1,
    encode_seconds=0.1,
    decode_seconds=0.1,
    max_batch_size=4,
    max_prompt_characters=1000,
    memory=ImageMemory(
        weights=1,
        num_blocks=1,
        token_bytes=1,
        latent_bytes=1,
        pixels_per_token=16,
        max_text_tokens=512,
        pads_prompts=False,
        step_values=(Values(1, 1),),
        encode_token_bytes=1,
        encode_pixel_bytes=1,
        decode_pixel_bytes=1,
    ),
)
_names = itertools.count()


@dataclass
class Tally:
    """What the workers of one process did since a Unix time. Durations are in seconds."""

    since: float = 0.0
    num_jobs: int = 0
    num_attempts: int = 0
    claim_s: list[float] = field(default_factory=list)
    wait_s: list[float] = field(default_factory=list)


def make_job(prefix: str) -> Job:
    number = next(_names)
    side = _SIDES[number % len(_SIDES)]
    request = ImageRequest(
        model=MODEL,
        prompt="a red circle to the left of a blue square",
        height=side,
        width=side,
        num_inference_steps=4,
        guidance_scale=3.5,
        seed=number,
        is_guided=False,
        budget=QualityBudget(1.0),
        point=EXACT,
    )
    return Job(
        id=f"job_{prefix}_{number}",
        model=MODEL,
        requests=(request,),
        output=Output(),
        priority=Priority.NORMAL,
        quality_requested=1.0,
        predicted_seconds=1.0,
        request_id="benchmark",
        created_at=time.time(),
        owner=f"key{number % _NUM_OWNERS}",
        memory=RequestMemory(running=side * side),
    )


def make_store(url: str) -> RedisStore:
    """A store with connections of its own. Its results stay in this process: only jobs are measured."""
    return RedisStore(
        connect(url),
        MemoryResults(ttl_s=60.0, max_bytes=10**9, clock=time.time),
        job_ttl_s=3600.0,
        events_ttl_s=300.0,
        lease_s=60.0,
        max_attempts=3,
        clock=SharedClock(time.time),
        on_error=print,
    )


def anything(_: JobKind) -> Fit:
    return Fit.NOW


def fill(url: str, num_jobs: int, prefix: str) -> None:
    async def run() -> None:
        store, calls = make_store(url), list[tuple[Any, ...]]()
        redis: Any = store._redis

        async def keep(*arguments: Any) -> None:
            calls.append(arguments)

        redis.evalsha = keep
        await redis.script_load(ADD)
        for start in range(0, num_jobs, 500):
            for _ in range(min(500, num_jobs - start)):
                await store.add(make_job(prefix))
            async with redis.pipeline(transaction=False) as pipeline:  # many calls in a message, which is quicker
                for arguments in calls:
                    pipeline.evalsha(*arguments)
                await pipeline.execute()
            calls.clear()
        await store.close()

    asyncio.run(run())


def submit(url: str, rate: float, until: float, prefix: str) -> None:
    """Add jobs at random times, `rate` a second, until a Unix time."""

    async def run() -> None:
        store, due = make_store(url), time.time()
        while (due := due + random.expovariate(rate)) < until:
            await asyncio.sleep(max(0.0, due - time.time()))
            await store.add(make_job(prefix))
        await store.close()

    asyncio.run(run())


def work(url: str, num_workers: int, service_s: float, since: float, until: float, prefix: str) -> Tally:
    """Workers that run one job at a time until a Unix time. Without `service_s` each ended job is replaced.

    They are counted from `since` on, when they know the kinds of jobs.
    """
    tally = Tally(since)

    async def keep_working() -> None:
        while time.time() < until:
            with suppress(StoreUnavailable):  # 200 workers that start at once on a busy machine
                await _work(url, service_s, until, prefix, tally)

    async def run() -> None:
        await asyncio.gather(*(keep_working() for _ in range(num_workers)))

    asyncio.run(run())
    return tally


async def _work(url: str, service_s: float, until: float, prefix: str, tally: Tally) -> None:
    store = make_store(url)
    _count_claims(store, tally)
    woken = asyncio.Event()
    await store.open(on_queued=woken.set, on_cancelled=lambda job_id: None)
    try:
        await store.announce(WorkerRecord(store.worker_id, "1", "cpu", WorkerState.IDLE, {MODEL: _CARD}))
        await _claim_and_run(store, woken, service_s, until, prefix, tally)
    finally:
        await store.close()


async def _claim_and_run(
    store: RedisStore, woken: asyncio.Event, service_s: float, until: float, prefix: str, tally: Tally
) -> None:
    while time.time() < until:
        woken.clear()
        began = time.perf_counter()
        claim = await store.claim(anything)
        if claim is None:
            try:
                async with asyncio.timeout(min(1.0, max(0.0, until - time.time()))):
                    await woken.wait()
            except TimeoutError:
                pass
            continue
        if time.time() >= tally.since:
            tally.num_jobs += 1
            tally.claim_s.append(time.perf_counter() - began)
            tally.wait_s.append(time.time() - claim.job.created_at)
        await _run_job(store, claim, service_s)
        if not service_s:
            await store.add(make_job(f"{prefix}_{store.worker_id[:8]}"))


async def _run_job(store: RedisStore, claim: Claim, service_s: float) -> None:
    for step in range(1, NUM_EVENTS + 1):
        await asyncio.sleep(service_s / NUM_EVENTS)
        await store.record(Progress(claim, step, NUM_EVENTS, step / NUM_EVENTS, 1.0 - step / NUM_EVENTS))
    await store.end(Ending(claim, JobStatus.SUCCEEDED, artifacts=(b"image",)))


def _count_claims(store: RedisStore, tally: Tally) -> None:
    redis: Any = store._redis
    evalsha = redis.evalsha

    def counted(sha: str, *arguments: Any) -> Any:
        tally.num_attempts += sha == _CLAIM_SHA and time.time() >= tally.since
        return evalsha(sha, *arguments)

    redis.evalsha = counted


def summed(tallies: list[Tally]) -> Tally:
    return Tally(
        tallies[0].since,
        sum(tally.num_jobs for tally in tallies),
        sum(tally.num_attempts for tally in tallies),
        [seconds for tally in tallies for seconds in tally.claim_s],
        [seconds for tally in tallies for seconds in tally.wait_s],
    )
