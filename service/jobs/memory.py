"""The job store of a single process, in its memory."""

import uuid
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, dropwhile, islice

from service.errors import IdempotencyKeyReused, JobNotFinished, JobNotFound
from service.jobs.job import Failure, FinishedJob, Job, JobSnapshot, JobState, JobStatus
from service.jobs.results import Results
from service.jobs.store import (
    MOST_KINDS,
    WEBHOOK_HELD_S,
    Changes,
    Claim,
    Ending,
    Event,
    EventName,
    Fit,
    Fits,
    Idempotency,
    JobKind,
    Preview,
    Progress,
    Recovery,
)
from service.order import input_image_bytes
from service.scheduling.fleet import Load, ModelLoad, WorkerRecord

_Entry = tuple[tuple[float, int], str]
"""Place and arrival of a queued job, and its id."""
_Sum = tuple[str, str | None]
"""What is summed up, and for which model or owner. Seconds are in whole microseconds, so that sums are exact."""


@dataclass(slots=True)
class _Record:
    job: Job
    kind: JobKind
    entry: _Entry
    key: tuple[str, str] | None
    state: JobState = field(default_factory=JobState)
    counted: Counter[_Sum] = field(default_factory=Counter)
    lease: str | None = None
    lease_ends: float = 0.0
    events: list[Event] = field(default_factory=list)

    @property
    def snapshot(self) -> JobSnapshot:
        return JobSnapshot(self.job, self.state)


class MemoryStore:
    """Jobs in memory. An ended job is deleted after `job_ttl_s`, its events and previews after `events_ttl_s`."""

    is_shared = False

    def __init__(
        self,
        results: Results,
        *,
        job_ttl_s: float,
        events_ttl_s: float,
        lease_s: float,
        max_attempts: int,
        clock: Callable[[], float],
    ) -> None:
        self.changes = Changes()
        self.worker_id = uuid.uuid4().hex
        self._results = results
        self._job_ttl_s = job_ttl_s
        self._events_ttl_s = events_ttl_s
        self._lease_s = lease_s
        self._max_attempts = max_attempts
        self.clock = clock
        self._records: dict[str, _Record] = {}
        self._queues: dict[JobKind, list[_Entry]] = {}  # sorted, none of them empty
        self._arrivals = count()
        self._live: set[str] = set()
        self._running: set[str] = set()
        self._sums: Counter[_Sum] = Counter()  # over all live jobs
        self._worker: WorkerRecord | None = None
        self._keys: dict[tuple[str, str], tuple[str, str]] = {}  # (owner, key) -> (fingerprint, job id)
        self._webhooks: dict[str, tuple[float, int]] = {}  # job id -> (when it is due, how often it was taken)
        self._delete_at: dict[str, float] = {}  # in the order of the jobs' ends, so times rise
        self._delete_events_at: dict[str, float] = {}  # in the order of the jobs' ends, so times rise
        self._on_queued: Callable[[], None] = lambda: None
        self._on_cancelled: Callable[[str], None] = lambda job_id: None

    async def open(self, *, on_queued: Callable[[], None], on_cancelled: Callable[[str], None]) -> None:
        self._on_queued, self._on_cancelled = on_queued, on_cancelled

    async def close(self) -> None:
        pass

    async def check(self) -> None:
        await self._results.check()

    async def add(self, job: Job, idempotency: Idempotency | None = None) -> Job:
        self._delete_old()
        key = None
        if idempotency is not None:
            if (existing := await self.find(idempotency)) is not None:
                return existing
            key = (idempotency.owner, idempotency.key)
            self._keys[key] = (idempotency.fingerprint, job.id)
        record = _Record(job, JobKind.of(job), ((job.place, next(self._arrivals)), job.id), key)
        self._records[job.id] = record
        self._live.add(job.id)
        self._queue_again(record)
        return job

    async def find(self, idempotency: Idempotency) -> Job | None:
        self._delete_old()
        existing = self._keys.get((idempotency.owner, idempotency.key))
        if existing is None:
            return None
        fingerprint, job_id = existing
        if fingerprint != idempotency.fingerprint:
            raise IdempotencyKeyReused(idempotency.key)
        return self._records[job_id].job

    async def get(self, job_id: str) -> JobSnapshot:
        return self._record(job_id).snapshot

    async def content(self, job_id: str) -> FinishedJob:
        record = self._record(job_id)
        job, state = record.job, record.state
        if state.content is None:
            raise JobNotFinished(f"job {job_id} is {state.status}; only a succeeded job has content")
        return FinishedJob(job, state, await self._results.get(state.content))

    async def claim(self, fits: Fits) -> Claim | None:
        for kind, queue in sorted(self._queues.items(), key=lambda item: item[1][0])[:MOST_KINDS]:
            match fits(kind):
                case Fit.NOW:
                    return self._claim(self._records[queue[0][1]])
                case Fit.WAITS:
                    return None
        return None

    def _claim(self, record: _Record) -> Claim:
        self._leave_queue(record)
        record.state = replace(
            record.state.moved_to(JobStatus.RUNNING),
            started_at=self.clock(),
            steps_done=0,
            num_steps=None,
            attempts=record.state.attempts + 1,
        )
        record.lease = uuid.uuid4().hex
        record.lease_ends = self.clock() + self._lease_s
        self._running.add(record.job.id)
        self._count(record)
        self._tell(record, EventName.STARTED)
        return Claim(record.job, record.lease)

    async def renew(self, claims: Sequence[Claim]) -> set[str]:
        lost = set()
        for claim in claims:
            if (record := self._claimed(claim)) is None:
                lost.add(claim.job.id)
            else:
                record.lease_ends = self.clock() + self._lease_s
        return lost

    async def record(self, progress: Progress) -> None:
        if (record := self._claimed(progress.claim)) is not None:
            record.state = replace(
                record.state,
                steps_done=progress.steps_done,
                num_steps=progress.num_steps,
                compute_ratio=progress.compute_ratio,
            )
            self._count(record)
            self._tell(record, EventName.PROGRESS, **progress.event_data)

    async def add_preview(self, preview: Preview) -> None:
        if (record := self._claimed(preview.claim)) is not None:
            self._tell(record, EventName.PREVIEW, **preview.event_data)

    async def end(self, ending: Ending) -> JobSnapshot | None:
        content = None
        if ending.status is JobStatus.SUCCEEDED:
            content = f"{ending.claim.job.id}/{ending.claim.lease}"
            await self._results.put(content, ending.artifacts)
        if (record := self._claimed(ending.claim)) is None:
            return None
        record.state = replace(record.state, failure=ending.failure, receipts=ending.receipts, content=content)
        return self._end(record, ending.status)

    async def release(self, claim: Claim) -> None:
        if (record := self._claimed(claim)) is not None:
            record.state = replace(record.state, attempts=record.state.attempts - 1)
            self._queue_again(record)

    async def cancel(self, job_id: str) -> tuple[JobSnapshot, bool]:
        record = self._record(job_id)
        if record.state.status.is_terminal:
            return record.snapshot, False
        was_claimed = record.lease is not None
        snapshot = self._end(record, JobStatus.CANCELLED)
        if was_claimed:
            self._on_cancelled(job_id)
        return snapshot, True

    async def fail(self, job_id: str, failure: Failure) -> JobSnapshot | None:
        record = self._record(job_id)
        if record.state.status.is_terminal:
            return None
        record.state = replace(record.state, failure=failure)
        return self._end(record, JobStatus.FAILED)

    async def recover(self) -> Recovery:
        requeued, failed = [], []
        for job_id in sorted(self._running):
            record = self._records[job_id]
            if record.lease_ends > self.clock():
                continue
            if record.state.attempts < self._max_attempts:
                self._queue_again(record)
                requeued.append(job_id)
            else:
                failed.append(await self.fail(job_id, Failure.worker_lost(job_id, record.state.attempts)))
        return Recovery(tuple(requeued), tuple(snapshot for snapshot in failed if snapshot is not None))

    async def take_webhook(self) -> tuple[JobSnapshot, int] | None:
        for job_id, (due_at, attempts) in self._webhooks.items():
            if due_at <= self.clock():
                self._webhooks[job_id] = (self.clock() + WEBHOOK_HELD_S, attempts + 1)
                return self._records[job_id].snapshot, attempts
        return None

    async def settle_webhook(self, job_id: str, retry_in_s: float | None) -> None:
        if retry_in_s is None:
            self._webhooks.pop(job_id, None)
        elif job_id in self._webhooks:
            self._webhooks[job_id] = (self.clock() + retry_in_s, self._webhooks[job_id][1])

    async def events(self, job_id: str, after: str) -> list[Event]:
        seen = int(after.partition("-")[0])
        return [event for event in self._record(job_id).events if int(event.id.partition("-")[0]) > seen]

    async def live_jobs(self) -> list[JobSnapshot]:
        return [self._records[job_id].snapshot for job_id in self._live]

    async def jobs(self, owner: str | None, *, limit: int, before: str | None = None) -> list[JobSnapshot]:
        self._delete_old()
        newest_first = reversed(self._records)  # which has them in the order of their arrival
        if before is not None:
            if owner not in (None, self._record(before).job.owner):
                raise JobNotFound(f"there is no job '{before}'")
            newest_first = dropwhile(lambda job_id: job_id != before, newest_first)
            next(newest_first)
        records = (self._records[job_id] for job_id in newest_first)
        own = (record.snapshot for record in records if owner is None or record.job.owner == owner)
        return list(islice(own, limit))

    async def positions(self, job_ids: Sequence[str]) -> list[int | None]:
        return [self._position(job_id) for job_id in job_ids]

    def _position(self, job_id: str) -> int | None:
        record = self._records.get(job_id)
        if record is None or record.state.status is not JobStatus.QUEUED:
            return None
        queues = (queue for kind, queue in self._queues.items() if kind.model == record.kind.model)
        return sum(bisect_left(queue, record.entry) for queue in queues)

    async def load(self, owner: str | None = None) -> Load:
        sums = self._sums
        models = {
            model: ModelLoad(
                num_queued=sums["queued", model],
                num_running=sums["running", model],
                queued_s=sums["queued_us", model] / 1e6,
                running_s=sums["running_us", model] / 1e6,
                urgent_s=sums["urgent_us", model] / 1e6,
            )
            for what, model in sums
            if what in ("queued", "running") and model is not None
        }
        own_s = 0.0 if owner is None else sums["own_us", owner] / 1e6
        num_owners = sum(what == "own_us" and key is not None for what, key in sums)
        return Load(models, image_bytes=sums["image_bytes", None], own_s=own_s, num_owners=num_owners)

    async def announce(self, record: WorkerRecord) -> None:
        self._worker = record

    async def withdraw(self) -> None:
        self._worker = None

    async def workers(self) -> list[WorkerRecord]:
        return [] if self._worker is None else [self._worker]

    def _record(self, job_id: str) -> _Record:
        self._delete_old()
        if job_id not in self._records:
            raise JobNotFound(f"there is no job '{job_id}'")
        return self._records[job_id]

    def _claimed(self, claim: Claim) -> _Record | None:
        record = self._records.get(claim.job.id)
        return record if record is not None and record.lease == claim.lease else None

    def _queue_again(self, record: _Record) -> None:
        if record.state.status is not JobStatus.QUEUED:
            record.state = replace(record.state.moved_to(JobStatus.QUEUED), steps_done=0, num_steps=None)
        record.lease = None
        self._running.discard(record.job.id)
        insort(self._queues.setdefault(record.kind, []), record.entry)
        self._count(record)
        self._tell(record, EventName.QUEUED)
        self._on_queued()

    def _end(self, record: _Record, status: JobStatus) -> JobSnapshot:
        now = self.clock()
        if record.state.status is JobStatus.QUEUED:
            self._leave_queue(record)
        record.state = replace(record.state.moved_to(status), ended_at=now)
        self._count(record)
        job = record.job = record.job.without_input_images()
        record.lease = None
        self._live.discard(job.id)
        self._running.discard(job.id)
        self._delete_at[job.id] = now + self._job_ttl_s
        self._delete_events_at[job.id] = now + self._events_ttl_s
        if job.webhook_url is not None:
            self._webhooks[job.id] = (now, 0)
        self._tell(record, EventName.ENDED, status=status)
        return record.snapshot

    def _leave_queue(self, record: _Record) -> None:
        queue = self._queues[record.kind]
        del queue[bisect_left(queue, record.entry)]
        if not queue:
            del self._queues[record.kind]

    def _count(self, record: _Record) -> None:
        """Bring the sums up to date after a change of the job."""
        job, status = record.job, record.state.status
        self._sums.subtract(record.counted)
        for name in record.counted:
            if not self._sums[name]:
                del self._sums[name]
        record.counted.clear()
        if not status.is_terminal:
            microseconds = round(record.snapshot.remaining_seconds * 1e6)
            record.counted[str(status), job.model] = 1
            record.counted[f"{status}_us", job.model] = microseconds
            record.counted["own_us", job.owner] = microseconds
            if job.is_urgent:
                record.counted["urgent_us", job.model] = microseconds
            record.counted["image_bytes", None] = input_image_bytes(job.requests)
        self._sums.update(record.counted)

    def _tell(self, record: _Record, name: EventName, **data: object) -> None:
        record.events.append(Event(f"{len(record.events) + 1}-0", name, data))
        self.changes.notify(record.job.id)

    def _delete_old(self) -> None:
        now = self.clock()
        for job_id in _due(self._delete_events_at, now):
            if job_id in self._records:
                self._records[job_id].events.clear()
        for job_id in _due(self._delete_at, now):
            self._webhooks.pop(job_id, None)
            if (key := self._records.pop(job_id).key) is not None:
                del self._keys[key]


def _due(times: dict[str, float], now: float) -> Iterator[str]:
    """Remove and yield, one by one, the names whose time has come. The times rise."""
    while times:
        name, due_at = next(iter(times.items()))
        if due_at > now:
            return
        del times[name]
        yield name
