"""The job store in Redis, shared by any number of servers and workers, which may die at any moment."""

import json
import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from redis.asyncio import Redis

from service.errors import IdempotencyKeyReused, JobNotFinished, JobNotFound, JobUnreadable, StoreUnavailable
from service.jobs import redis_scripts
from service.jobs.job import Failure, FailureReason, FinishedJob, Job, JobSnapshot, JobStatus
from service.jobs.redis_adoption import Adoption
from service.jobs.redis_claims import Claimed, Claims
from service.jobs.redis_messages import Messages
from service.jobs.redis_operations import CHECK_LIMIT_S, LIMIT_S, PREFIX, RESULTS_LIMIT_S, RedisOperations
from service.jobs.redis_records import (
    KindEntry,
    dump_failure,
    dump_job,
    dump_kind,
    dump_receipts,
    load_event,
    load_pictures,
    load_snapshot,
    load_sums,
    version_of,
)
from service.jobs.redis_workers import Workers
from service.jobs.results import Results
from service.jobs.shared_clock import SharedClock
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
from service.order import pictures_of
from service.scheduling.fleet import Load, WorkerRecord

logger = logging.getLogger(__name__)


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
        clock: SharedClock,
        on_error: Callable[[str], None],
        prefix: str = PREFIX,
    ) -> None:
        self.worker_id = uuid.uuid4().hex
        self._redis: Any = redis  # redis-py's types leave open whether answers are bytes or texts
        self._results = results
        self._job_ttl_ms = int(job_ttl_s * 1000)
        self._events_ttl_ms = int(events_ttl_s * 1000)
        self._lease_ms = int(lease_s * 1000)
        self._max_attempts = max_attempts
        self.clock = clock
        self._on_error = on_error
        self._operation = RedisOperations(on_error)
        self._prefix = prefix
        self._messages = Messages(redis, self._pass_on)
        self.changes = Changes(
            on_first=lambda job_id: self._messages.listen(self._key(f"job:{job_id}")),
            on_last=lambda job_id: self._messages.ignore(self._key(f"job:{job_id}")),
        )
        self._adoption = Adoption(redis, prefix)
        self._workers = Workers(redis, prefix, lease_ms=self._lease_ms)
        self._claims = Claims(redis, prefix, self.worker_id, lease_ms=self._lease_ms)
        self._on_queued: Callable[[], None] = lambda: None
        self._on_cancelled: Callable[[str], None] = lambda job_id: None
        self._add = redis.register_script(redis_scripts.ADD)
        self._renew = redis.register_script(redis_scripts.RENEW)
        self._record = redis.register_script(redis_scripts.RECORD)
        self._end = redis.register_script(redis_scripts.END)
        self._release = redis.register_script(redis_scripts.RELEASE)
        self._recover = redis.register_script(redis_scripts.RECOVER)
        self._take_webhook = redis.register_script(redis_scripts.TAKE_WEBHOOK)
        self._settle_webhook = redis.register_script(redis_scripts.SETTLE_WEBHOOK)
        self._position = redis.register_script(redis_scripts.POSITION)
        self._jobs = redis.register_script(redis_scripts.JOBS)

    async def open(self, *, on_queued: Callable[[], None], on_cancelled: Callable[[str], None]) -> None:
        self._on_queued, self._on_cancelled = on_queued, on_cancelled
        self._messages.listen(self._key(f"worker:{self.worker_id}"))
        self._messages.open()

    async def close(self) -> None:
        await self._messages.close()
        await self._redis.aclose()

    async def check(self) -> None:
        # A full Redis, and one that only replicates another, answer but refuse to write.
        async with self._operation("check", CHECK_LIMIT_S):
            await self._redis.set(self._key("check"), 1, px=1000)
        await self._results.check()

    async def add(self, job: Job, idempotency: Idempotency | None = None) -> Job:
        pictures = pictures_of(job.requests[0])
        fields: list[Any] = ["version", version_of(job), "job", dump_job(job.without_input_images())]
        if pictures:
            fields += ["picture_sizes", json.dumps([len(picture) for picture in pictures])]
        if job.webhook_url is not None:
            fields += ["webhook_url", job.webhook_url]
        name, value = "", ""
        if idempotency is not None:
            name, value = f"{idempotency.owner}:{idempotency.key}", f"{idempotency.fingerprint} {job.id}"
        kind, entry = dump_kind(KindEntry.of(job))
        of_kind = [job.model, kind, entry, _microseconds(job.predicted_seconds), job.owner or ""]
        async with self._operation("add", RESULTS_LIMIT_S if pictures else LIMIT_S):
            existing = await self._run(self._add, job.id, *of_kind, name, value, b"".join(pictures), job.place, *fields)
        return job if existing is None or idempotency is None else await self._existing(idempotency, existing)

    async def find(self, idempotency: Idempotency) -> Job | None:
        async with self._operation("find"):
            existing = await self._redis.get(self._key(f"key:{idempotency.owner}:{idempotency.key}"))
        try:
            return None if existing is None else await self._existing(idempotency, existing)
        except JobNotFound:  # its record was deleted before its key
            return None

    async def _existing(self, idempotency: Idempotency, value: bytes) -> Job:
        """The job of an idempotency key whose `value` in Redis is fingerprint and job id."""
        fingerprint, _, job_id = value.decode().partition(" ")
        if fingerprint != idempotency.fingerprint:
            raise IdempotencyKeyReused(idempotency.key)
        return (await self.get(job_id)).job

    async def get(self, job_id: str) -> JobSnapshot:
        async with self._operation("get"):
            fields = await self._redis.hgetall(self._key(f"job:{job_id}"))
        return load_snapshot(job_id, fields)

    async def content(self, job_id: str) -> FinishedJob:
        snapshot = await self.get(job_id)
        state = snapshot.state
        if state.content is None:
            raise JobNotFinished(f"job {job_id} is {state.status}; only a succeeded job has content")
        return FinishedJob(snapshot.job, state, await self._results.get(state.content))

    async def claim(self, fits: Fits) -> Claim | None:
        while True:
            async with self._operation("claim"):
                claimed = await self._claims.claim(fits, self.clock())
            if claimed is None:
                return None
            job_id = claimed.job_id
            try:
                if (job := await self._claimed_job(claimed)) is not None:
                    return Claim(job, claimed.lease)
            except JobNotFound:  # another call has ended it since
                pass
            except JobUnreadable as error:
                await self._fail_unreadable(job_id, error)

    async def _claimed_job(self, claimed: Claimed) -> Job | None:
        """The claimed job with its pictures; None if it has ended since. Raises JobUnreadable, JobNotFound."""
        job = load_snapshot(claimed.job_id, claimed.fields).job
        if claimed.kind is None or claimed.kind.model != job.model:  # the worker may not have its model
            raise JobUnreadable(job.id)
        if not pictures_of(job.requests[0]):
            return job
        async with self._operation("claim", RESULTS_LIMIT_S):
            data = await self._redis.get(self._key(f"job:{job.id}:picture"))
        return None if data is None else load_pictures(job, data, claimed.fields)

    async def _fail_unreadable(self, job_id: str, error: JobUnreadable | None = None) -> None:
        """End a job without reading its record."""
        self._report_unreadable(job_id, error)
        failure = Failure(FailureReason.GENERATION_FAILED, str(JobUnreadable(job_id)))
        await self._end_job(job_id, "", JobStatus.FAILED, {"failure": dump_failure(failure)})

    async def renew(self, claims: Sequence[Claim]) -> set[str]:
        pairs = [part for claim in claims for part in (claim.job.id, claim.lease)]
        async with self._operation("renew"):
            asked_at = self.clock.local()
            lost, now_ms = await self._run(self._renew, self._lease_ms, *pairs)
        self.clock.adjust(now_ms / 1000, asked_at=asked_at)
        return {job_id.decode() for job_id in lost}

    async def record(self, progress: Progress) -> None:
        job, lease = progress.claim.job, progress.claim.lease
        fields = [
            *("steps_done", progress.steps_done, "num_steps", progress.num_steps),
            *("compute_ratio", progress.compute_ratio),
        ]
        microseconds = _microseconds(job.seconds_left(progress.steps_done, progress.num_steps))
        data = json.dumps(progress.event_data)
        async with self._operation("record"):
            await self._run(self._record, job.id, lease, EventName.PROGRESS, data, microseconds, *fields)

    async def add_preview(self, preview: Preview) -> None:
        job_id, data = preview.claim.job.id, json.dumps(preview.event_data)
        async with self._operation("add_preview"):
            await self._run(self._record, job_id, preview.claim.lease, EventName.PREVIEW, data, "")

    async def end(self, ending: Ending) -> JobSnapshot | None:
        job_id, lease = ending.claim.job.id, ending.claim.lease
        fields: dict[str, Any] = {"receipts": dump_receipts(ending.receipts)}
        if ending.failure is not None:
            fields["failure"] = dump_failure(ending.failure)
        if ending.status is JobStatus.SUCCEEDED:
            fields["content"] = f"{job_id}/{lease}"
            await self._results.put(fields["content"], ending.artifacts)
        return _snapshot(job_id, await self._end_job(job_id, lease, ending.status, fields))

    async def _end_job(
        self, job_id: str, lease: str, status: JobStatus, fields: Mapping[str, Any]
    ) -> dict[bytes, bytes] | None:
        """The fields of the job's record if this call ended it."""
        changed = {"ended_at": self.clock(), **fields}
        pairs = [part for pair in changed.items() for part in pair]
        models, num_looks = json.dumps(self._claims.models), self._claims.num_looks
        arguments = [job_id, lease, self._job_ttl_ms, self._events_ttl_ms, status, self.worker_id, models, *pairs]
        async with self._operation("end"):
            answer = await self._run(self._end, *arguments)
        if answer is None:
            return None
        ended, is_idle = answer
        if is_idle and self._claims.models:
            self._claims.rest(num_looks)
        return dict(zip(ended[::2], ended[1::2], strict=True))

    async def release(self, claim: Claim) -> None:
        async with self._operation("release"):
            await self._run(self._release, claim.job.id, claim.lease)

    async def cancel(self, job_id: str) -> tuple[JobSnapshot, bool]:
        cancelled = _snapshot(job_id, await self._end_job(job_id, "", JobStatus.CANCELLED, {}))
        return (await self.get(job_id), False) if cancelled is None else (cancelled, True)

    async def fail(self, job_id: str, failure: Failure) -> JobSnapshot | None:
        fields = {"failure": dump_failure(failure)}
        return _snapshot(job_id, await self._end_job(job_id, "", JobStatus.FAILED, fields))

    async def recover(self) -> Recovery:
        async with self._operation("recover"):
            # After a restart of Redis, living workers first renew the leases that ran out meanwhile.
            uptime_s = (await self._redis.info("server"))["uptime_in_seconds"]
            if uptime_s * 1000 < self._lease_ms:
                return Recovery()
            requeued, given_up = await self._run(self._recover, self._max_attempts)
            unreadable = await self._adoption.adopt()
        for job_id in unreadable:
            await self._fail_unreadable(job_id)
        failed = []
        for job_id, attempts in ((job_id.decode(), attempts) for job_id, attempts in given_up):
            try:
                failed.append(await self.fail(job_id, Failure.worker_lost(job_id, attempts)))
            except JobUnreadable as error:
                self._report_unreadable(job_id, error)
        ids = tuple(job_id.decode() for job_id in requeued)
        return Recovery(ids, tuple(snapshot for snapshot in failed if snapshot is not None))

    async def take_webhook(self) -> tuple[JobSnapshot, int] | None:
        while True:
            async with self._operation("take_webhook"):
                taken = await self._run(self._take_webhook, int(WEBHOOK_HELD_S * 1000))
            if taken is None:
                return None
            job_id = taken[0].decode()
            try:
                return await self.get(job_id), taken[1]
            except JobNotFound:
                pass
            except JobUnreadable as error:
                self._report_unreadable(job_id, error)
            await self.settle_webhook(job_id, None)

    def _report_unreadable(self, job_id: str, error: JobUnreadable | None) -> None:
        self._on_error("read")
        logger.error("the job's record can't be read", exc_info=error, extra={"job_id": job_id})

    async def settle_webhook(self, job_id: str, retry_in_s: float | None) -> None:
        async with self._operation("settle_webhook"):
            await self._run(self._settle_webhook, job_id, "" if retry_in_s is None else int(retry_in_s * 1000))

    async def events(self, job_id: str, after: str) -> list[Event]:
        async with self._operation("events"):
            entries = await self._redis.xrange(self._key(f"job:{job_id}:events"), f"({after}")
            if not entries and not await self._redis.exists(self._key(f"job:{job_id}")):
                raise JobNotFound(f"there is no job '{job_id}'")
        return [event for event in (load_event(event_id, fields) for event_id, fields in entries) if event is not None]

    async def live_jobs(self) -> list[JobSnapshot]:
        async with self._operation("live_jobs"):
            ids = await self._redis.hkeys(self._key("counted"))
        jobs = []
        for job_id in ids:
            with suppress(JobNotFound, JobUnreadable):
                jobs.append(await self.get(job_id.decode()))
        return jobs

    async def jobs(self, owner: str | None, *, limit: int, before: str | None = None) -> list[JobSnapshot]:
        jobs: list[JobSnapshot] = []
        while len(jobs) < limit:  # again, for those that are left out
            most = limit - len(jobs)
            async with self._operation("jobs"):
                found = await self._run(self._jobs, owner or "", most, before or "")
            if found is None:
                raise JobNotFound(f"there is no job '{before}'")
            for job_id, fields in found:
                before = job_id.decode()
                with suppress(JobNotFound, JobUnreadable, StoreUnavailable):
                    jobs.append(load_snapshot(before, dict(zip(fields[::2], fields[1::2], strict=True))))
            if len(found) < most:
                break
        return jobs

    async def positions(self, job_ids: Sequence[str]) -> list[int | None]:
        # One message with a call for each job: a call for all of them would hold up others.
        async with self._operation("positions"), self._redis.pipeline(transaction=False) as reading:
            for job_id in job_ids:
                await self._position(keys=[self._prefix], args=[job_id], client=reading)
            positions: list[int | None] = await reading.execute()
        return positions

    async def load(self, owner: str | None = None) -> Load:
        # No transaction: a full Redis refuses even to read in one.
        async with self._operation("load"), self._redis.pipeline(transaction=False) as reading:
            reading.hgetall(self._key("load"))
            reading.hget(self._key("owners"), owner or "")
            reading.hlen(self._key("owners"))
            sums, own_us, num_owners = await reading.execute()
        return load_sums(sums, own_us, num_owners)

    async def announce(self, record: WorkerRecord) -> None:
        if self._claims.models != list(record.cards):
            self._claims.models = list(record.cards)
            self._wake()
        async with self._operation("announce"):
            await self._workers.announce(self.worker_id, record)

    async def withdraw(self) -> None:
        async with self._operation("withdraw"):
            await self._workers.withdraw(self.worker_id)

    async def workers(self) -> list[WorkerRecord]:
        async with self._operation("workers"):
            return await self._workers.living()

    def _key(self, name: str) -> str:
        return self._prefix + name

    async def _run(self, script: Any, *arguments: Any) -> Any:
        return await script(keys=[self._prefix], args=arguments)

    def _pass_on(self, channel: str, message: str) -> None:
        what, _, name = channel.removeprefix(self._prefix).partition(":")
        if what == "job":
            self.changes.notify(name)
        elif message.startswith(f"{JobStatus.CANCELLED}:"):
            self._on_cancelled(message.partition(":")[2])
        else:
            self._wake()

    def _wake(self) -> None:
        self._claims.wake()
        self._on_queued()


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _snapshot(job_id: str, fields: Mapping[bytes, bytes] | None) -> JobSnapshot | None:
    return None if fields is None else load_snapshot(job_id, fields)
