"""The job store in Redis, shared by any number of servers and workers, which may die at any moment."""

import asyncio
import json
import logging
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from models.request import MeshRequest
from service.errors import IdempotencyKeyReused, JobNotFinished, JobNotFound, StoreUnavailable
from service.jobs import redis_scripts
from service.jobs.job import Failure, FinishedJob, Job, JobSnapshot, JobState, JobStatus, Receipt
from service.jobs.job_json import dump_job, load_job
from service.jobs.results import Results
from service.jobs.store import (
    WEBHOOK_HELD_S,
    Changes,
    Claim,
    Ending,
    Event,
    EventName,
    Fits,
    Idempotency,
    Preview,
    Progress,
    Recovery,
)
from service.scheduling.batching import shape_of

logger = logging.getLogger(__name__)

PREFIX = "elastic:"
# The queue is read in pieces of this length until a job fits.
_CHUNK = 64
_RECONNECT_S = 0.5

_RECEIPTS = TypeAdapter(tuple[Receipt, ...])
_FAILURE = TypeAdapter(Failure)


def connect(url: str) -> Redis:
    """A client with short timeouts that retries briefly when its connection is lost."""
    return Redis.from_url(
        url,
        socket_timeout=3,
        socket_connect_timeout=2,
        health_check_interval=15,
        max_connections=200,
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
    )


class RedisStore:
    """Jobs in Redis. An ended job is deleted after `job_ttl_s`, its events and previews after `events_ttl_s`.

    Redis must be durable (append-only file, synced always) and must not evict keys. `on_error` is called with the name
    of every operation that fails.
    """

    is_shared = True

    def __init__(
        self,
        redis: Redis,
        results: Results,
        *,
        job_ttl_s: float,
        events_ttl_s: float,
        lease_s: float,
        max_attempts: int,
        clock: Callable[[], float],
        on_error: Callable[[str], None],
        prefix: str = PREFIX,
    ) -> None:
        self.changes = Changes()
        self.worker_id = uuid.uuid4().hex
        self._redis: Any = redis  # redis-py's types leave open whether answers are bytes or texts
        self._results = results
        self._job_ttl_ms = int(job_ttl_s * 1000)
        self._events_ttl_ms = int(events_ttl_s * 1000)
        self._lease_ms = int(lease_s * 1000)
        self._max_attempts = max_attempts
        self._clock = clock
        self._on_error = on_error
        self._prefix = prefix
        self._channel = f"{prefix}changes"
        self._listener: asyncio.Task[None] | None = None
        self._on_queued: Callable[[], None] = lambda: None
        self._on_cancelled: Callable[[str], None] = lambda job_id: None
        self._add = redis.register_script(redis_scripts.ADD)
        self._claim = redis.register_script(redis_scripts.CLAIM)
        self._renew = redis.register_script(redis_scripts.RENEW)
        self._record = redis.register_script(redis_scripts.RECORD)
        self._end = redis.register_script(redis_scripts.END)
        self._release = redis.register_script(redis_scripts.RELEASE)
        self._recover = redis.register_script(redis_scripts.RECOVER)
        self._take_webhook = redis.register_script(redis_scripts.TAKE_WEBHOOK)
        self._settle_webhook = redis.register_script(redis_scripts.SETTLE_WEBHOOK)

    async def open(self, *, on_queued: Callable[[], None], on_cancelled: Callable[[str], None]) -> None:
        self._on_queued, self._on_cancelled = on_queued, on_cancelled
        self._listener = asyncio.create_task(self._listen())

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.cancel()
            with suppress(asyncio.CancelledError):
                await self._listener
        await self._redis.aclose()

    async def check(self) -> None:
        async with self._operation("check"):
            await self._redis.ping()

    async def add(self, job: Job, idempotency: Idempotency | None = None) -> Job:
        request = job.requests[0]
        input_image = request.input_image if isinstance(request, MeshRequest) else b""
        fields: list[Any] = ["job", dump_job(job.without_input_images())]
        if job.webhook_url is not None:
            fields += ["webhook_url", job.webhook_url]
        name, value = "", ""
        if idempotency is not None:
            name, value = f"{idempotency.owner}:{idempotency.key}", f"{idempotency.fingerprint} {job.id}"
        entry = _live_entry(job, job.predicted_seconds)
        async with self._operation("add"):
            existing = await self._run(self._add, job.id, job.place, entry, name, value, input_image, *fields)
        return job if existing is None or idempotency is None else await self._existing(idempotency, existing)

    async def find(self, idempotency: Idempotency) -> Job | None:
        async with self._operation("find"):
            existing = await self._redis.get(self._key(f"key:{idempotency.owner}:{idempotency.key}"))
        return None if existing is None else await self._existing(idempotency, existing)

    async def _existing(self, idempotency: Idempotency, value: bytes) -> Job:
        """The job of an idempotency key whose `value` in Redis is fingerprint and job id."""
        fingerprint, _, job_id = value.decode().partition(" ")
        if fingerprint != idempotency.fingerprint:
            raise IdempotencyKeyReused(idempotency.key)
        return (await self.get(job_id)).job

    async def get(self, job_id: str) -> JobSnapshot:
        async with self._operation("get"):
            fields = await self._redis.hgetall(self._key(f"job:{job_id}"))
        if b"job" not in fields:
            raise JobNotFound(f"there is no job '{job_id}'")
        return JobSnapshot(load_job(fields[b"job"]), _state_of(fields))

    async def content(self, job_id: str) -> FinishedJob:
        snapshot = await self.get(job_id)
        state = snapshot.state
        if state.content is None:
            raise JobNotFinished(f"job {job_id} is {state.status}; only a succeeded job has content")
        return FinishedJob(snapshot.job, state, await self._results.get(state.content))

    async def claim(self, fits: Fits) -> Claim | None:
        async with self._operation("claim"):
            async for job_id in self._waiting(fits):
                lease = uuid.uuid4().hex
                if await self._run(self._claim, job_id, lease, self._lease_ms, self._clock()) is None:
                    continue  # another worker was faster
                job = (await self.get(job_id)).job
                if isinstance(job.requests[0], MeshRequest):
                    input_image = await self._redis.get(self._key(f"job:{job_id}:picture"))
                    # It is missing if the job was cancelled meanwhile; the worker will learn of that.
                    job = replace(job, requests=(replace(job.requests[0], input_image=input_image or b""),))
                return Claim(job, lease)
        return None

    async def _waiting(self, fits: Fits) -> AsyncIterator[str]:
        """The ids of the waiting jobs that fit, in the order of the queue."""
        for start in range(0, 2**31, _CHUNK):
            ids = await self._redis.zrange(self._key("queue"), start, start + _CHUNK - 1)
            if not ids:
                return
            for job_id, entry in zip(ids, await self._redis.hmget(self._key("live"), ids), strict=True):
                if entry is None:
                    continue
                live = json.loads(entry)
                if fits(live["model"], live["shape"]):
                    yield job_id.decode()

    async def renew(self, claims: Sequence[Claim]) -> set[str]:
        pairs = [part for claim in claims for part in (claim.job.id, claim.lease)]
        async with self._operation("renew"):
            return {job_id.decode() for job_id in await self._run(self._renew, self.worker_id, self._lease_ms, *pairs)}

    async def record(self, progress: Progress) -> None:
        job, lease = progress.claim.job, progress.claim.lease
        fields = [
            *("steps_done", progress.steps_done, "num_steps", progress.num_steps),
            *("compute_ratio", progress.compute_ratio),
        ]
        seconds_left = job.seconds_left(progress.steps_done, progress.num_steps)
        data, entry = json.dumps(progress.event_data), _live_entry(job, seconds_left)
        async with self._operation("record"):
            await self._run(self._record, job.id, lease, EventName.PROGRESS, data, entry, *fields)

    async def add_preview(self, preview: Preview) -> None:
        job_id, data = preview.claim.job.id, json.dumps(preview.event_data)
        async with self._operation("add_preview"):
            await self._run(self._record, job_id, preview.claim.lease, EventName.PREVIEW, data, "")

    async def end(self, ending: Ending) -> JobSnapshot | None:
        job_id, lease = ending.claim.job.id, ending.claim.lease
        fields: dict[str, Any] = {"receipts": _RECEIPTS.dump_json(ending.receipts)}
        if ending.failure is not None:
            fields["failure"] = _FAILURE.dump_json(ending.failure)
        if ending.status is JobStatus.SUCCEEDED:
            fields["content"] = f"{job_id}/{lease}"
            async with self._operation("put_results"):
                await self._results.put(fields["content"], ending.artifacts)
        return await self._end_job(job_id, lease, ending.status, fields)

    async def _end_job(
        self, job_id: str, lease: str, status: JobStatus, fields: Mapping[str, Any]
    ) -> JobSnapshot | None:
        changed = {"ended_at": self._clock(), **fields}
        async with self._operation("end"):
            pairs = [part for pair in changed.items() for part in pair]
            if not await self._run(self._end, job_id, lease, self._job_ttl_ms, self._events_ttl_ms, status, *pairs):
                return None
        return await self.get(job_id)

    async def release(self, claim: Claim) -> None:
        async with self._operation("release"):
            await self._run(self._release, claim.job.id, claim.lease)

    async def cancel(self, job_id: str) -> tuple[JobSnapshot, bool]:
        snapshot = await self.get(job_id)
        if snapshot.state.status.is_terminal:
            return snapshot, False
        cancelled = await self._end_job(job_id, "", JobStatus.CANCELLED, {})
        return (await self.get(job_id), False) if cancelled is None else (cancelled, True)

    async def fail(self, job_id: str, failure: Failure) -> JobSnapshot | None:
        return await self._end_job(job_id, "", JobStatus.FAILED, {"failure": _FAILURE.dump_json(failure)})

    async def recover(self) -> Recovery:
        async with self._operation("recover"):
            # After a restart of Redis, living workers first renew the leases that ran out meanwhile.
            uptime_s = (await self._redis.info("server"))["uptime_in_seconds"]
            if uptime_s * 1000 < self._lease_ms:
                return Recovery()
            requeued, given_up = await self._run(self._recover, self._max_attempts)
        failed = []
        for job_id in (job_id.decode() for job_id in given_up):
            attempts = (await self.get(job_id)).state.attempts
            failed.append(await self.fail(job_id, Failure.worker_lost(job_id, attempts)))
        ids = tuple(job_id.decode() for job_id in requeued)
        return Recovery(ids, tuple(snapshot for snapshot in failed if snapshot is not None))

    async def take_webhook(self) -> tuple[JobSnapshot, int] | None:
        async with self._operation("take_webhook"):
            taken = await self._run(self._take_webhook, int(WEBHOOK_HELD_S * 1000))
        return None if taken is None else (await self.get(taken[0].decode()), taken[1])

    async def settle_webhook(self, job_id: str, retry_in_s: float | None) -> None:
        async with self._operation("settle_webhook"):
            await self._run(self._settle_webhook, job_id, "" if retry_in_s is None else int(retry_in_s * 1000))

    async def events(self, job_id: str, after: str) -> list[Event]:
        async with self._operation("events"):
            entries = await self._redis.xrange(self._key(f"job:{job_id}:events"), f"({after}")
        if not entries:
            await self.get(job_id)  # raises JobNotFound
        return [
            Event(event_id.decode(), EventName(fields[b"name"].decode()), json.loads(fields[b"data"]))
            for event_id, fields in entries
        ]

    async def live_jobs(self) -> list[JobSnapshot]:
        async with self._operation("live_jobs"):
            ids = await self._redis.hkeys(self._key("live"))
        jobs = []
        for job_id in ids:
            with suppress(JobNotFound):
                jobs.append(await self.get(job_id.decode()))
        return jobs

    async def backlog_s(self) -> float:
        async with self._operation("backlog"):
            entries = await self._redis.hvals(self._key("live"))
            num_workers = await self._redis.zcard(self._key("workers"))
        return float(sum(json.loads(entry)["seconds"] for entry in entries) / max(1, num_workers))

    async def input_image_bytes(self) -> int:
        async with self._operation("input_image_bytes"):
            ids = await self._redis.hkeys(self._key("live"))
            async with self._redis.pipeline(transaction=False) as sizes:
                for job_id in ids:
                    sizes.strlen(self._key(f"job:{job_id.decode()}:picture"))
                return sum(await sizes.execute())

    async def num_waiting(self) -> Counter[str]:
        async with self._operation("num_waiting"):
            ids = await self._redis.zrange(self._key("queue"), 0, -1)
            entries = await self._redis.hmget(self._key("live"), ids) if ids else []
        return Counter(json.loads(entry)["model"] for entry in entries if entry is not None)

    def _key(self, name: str) -> str:
        return self._prefix + name

    async def _run(self, script: Any, *arguments: Any) -> Any:
        return await script(keys=[self._prefix, self._channel], args=arguments)

    @asynccontextmanager
    async def _operation(self, name: str) -> AsyncIterator[None]:
        """Turn errors of Redis and of the network into StoreUnavailable, and report them to `on_error`."""
        try:
            yield
        except (RedisError, OSError) as error:
            self._on_error(name)
            raise StoreUnavailable("the job store can't be reached; try again in a moment") from error
        except StoreUnavailable:
            self._on_error(name)
            raise

    async def _listen(self) -> None:
        """Pass on the messages of the channel until cancelled. One connection serves all waiting tasks."""
        while True:
            try:
                async with self._redis.pubsub() as channel:
                    await channel.subscribe(self._channel)
                    while True:
                        message = await channel.get_message(ignore_subscribe_messages=True, timeout=1)
                        if message is not None:
                            self._pass_on(*message["data"].decode().split(":", 1))
            except (RedisError, OSError) as error:
                logger.warning("lost the connection that announces changes: %s", error)
                await asyncio.sleep(_RECONNECT_S)

    def _pass_on(self, what: str, job_id: str) -> None:
        self.changes.notify(job_id)
        if what == "queued":
            self._on_queued()
        elif what == JobStatus.CANCELLED:
            self._on_cancelled(job_id)


def _live_entry(job: Job, seconds_left: float) -> str:
    return json.dumps({"model": job.model, "shape": shape_of(job.requests[0]), "seconds": round(seconds_left, 6)})


def _state_of(fields: Mapping[bytes, bytes]) -> JobState:

    def number(name: bytes) -> float | None:
        return float(fields[name]) if name in fields else None

    return JobState(
        status=JobStatus(fields[b"status"].decode()),
        started_at=number(b"started_at"),
        ended_at=number(b"ended_at"),
        steps_done=int(fields.get(b"steps_done", b"0")),
        num_steps=int(fields[b"num_steps"]) if b"num_steps" in fields else None,
        compute_ratio=number(b"compute_ratio"),
        attempts=int(fields.get(b"attempts", b"0")),
        receipts=_RECEIPTS.validate_json(fields[b"receipts"]) if b"receipts" in fields else (),
        failure=_FAILURE.validate_json(fields[b"failure"]) if b"failure" in fields else None,
        content=fields[b"content"].decode() if b"content" in fields else None,
    )
