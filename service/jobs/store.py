"""The contract of every job store, and how the events of a job are followed.

One event loop uses a store. The store in Redis, which several processes share, has the same contract as the one in
memory: every method is atomic, and the first call that ends a job decides how it ended.
"""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, Protocol, Self

from models.memory import RequestMemory
from service.errors import StoreUnavailable
from service.jobs.job import Failure, FinishedJob, Job, JobSnapshot, JobStatus, Receipt
from service.scheduling.batching import shape_of
from service.scheduling.fleet import Load, WorkerRecord

# Notifications can be lost with their connection, so events are also polled at this interval.
_POLL_S = 1.0
# How long `follow` retries an unreachable store.
_RETRY_S = 60.0
BEGINNING = "0-0"
"""Before the first event of any job."""
END_ALONE = "0-1"
"""The id of a job's end once its events have been deleted; no other event has it."""
EVENTS_TTL_S = 300.0
"""How long the events of an ended job are kept. Their previews may have megabytes, and nobody counts these."""
MOST_KINDS = 1000
"""About how many kinds of waiting jobs a claim judges. With more of them, those of the earliest jobs."""
WEBHOOK_HELD_S = 60.0
"""How long a webhook that was taken is kept from others."""


class EventName(StrEnum):
    QUEUED = "job.queued"
    STARTED = "job.started"
    PROGRESS = "job.progress"
    PREVIEW = "job.preview"  # clients get another name, which says image or mesh
    ENDED = "job.ended"  # clients get another name, which says how it ended


@dataclass(frozen=True, slots=True)
class Event:
    """`id` is two numbers joined by a hyphen, which rises with each event of a job. `data` is JSON."""

    id: str
    name: EventName
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Idempotency:
    """An idempotency key: all calls of `owner` with this `key` create one job. `fingerprint` is a hash of the body."""

    owner: str
    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that belongs to one worker for as long as the worker renews the `lease`, a name that is used once."""

    job: Job
    lease: str


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a claimed job: share of the dense compute so far, and seconds left.

    `steps_done` of `num_steps` are computed steps of all its requests. A deadline may change `num_steps` on the way.
    """

    claim: Claim
    steps_done: int
    num_steps: int
    compute_ratio: float
    eta_s: float

    @property
    def event_data(self) -> dict[str, Any]:
        job = self.claim.job
        return {
            "step": self.steps_done // len(job.requests),
            "num_computed_steps": self.num_steps // len(job.requests),
            "num_inference_steps": job.requests[0].num_inference_steps,
            "compute_ratio": round(self.compute_ratio, 6),
            "eta_s": round(self.eta_s, 3),
        }


@dataclass(frozen=True, slots=True)
class Preview:
    """Preview `number` of the unfinished result of request `index`, as an encoded `file`.

    `created_at` is in Unix seconds.
    """

    claim: Claim
    index: int
    number: int
    file: bytes
    created_at: float

    @property
    def event_data(self) -> dict[str, Any]:
        b64_json = base64.b64encode(self.file).decode("ascii")
        return {
            "b64_json": b64_json,
            "partial_image_index": self.number,
            "index": self.index,
            "created_at": int(self.created_at),
        }


@dataclass(frozen=True, slots=True)
class Ending:
    """How a claimed job ended, with the artifacts and receipts of a success or the failure."""

    claim: Claim
    status: JobStatus
    failure: Failure | None = None
    receipts: tuple[Receipt, ...] = ()
    artifacts: tuple[bytes, ...] = ()


Report = Progress | Preview | Ending
"""What a worker reports about the jobs that it holds."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """Jobs whose workers died: the ids of requeued jobs, and the jobs that failed for good."""

    requeued: tuple[str, ...] = ()
    failed: tuple[JobSnapshot, ...] = ()


@dataclass(frozen=True, slots=True)
class JobKind:
    """What a worker needs to know of a job to say whether it has room for it. Jobs of one kind wait in one queue.

    `shape` is that of `scheduling.batching.shape_of`; each of the job's requests takes `memory` of the device. Urgent
    jobs, see `Job.is_urgent`, have places of their own.
    """

    model: str
    shape: str
    is_urgent: bool
    memory: RequestMemory

    @classmethod
    def of(cls, job: Job) -> Self:
        return cls(job.model, shape_of(job.requests[0]), job.is_urgent, job.memory)


class Fit(Enum):
    """Whether a worker has room for a kind of job."""

    NOW = "now"  # it can start one
    WAITS = "waits"  # it has to wait for memory; so do the jobs behind it, else it would be overtaken for ever
    NO = "no"  # it passes over those


Fits = Callable[[JobKind], Fit]
"""It is asked once for each kind of waiting job, not for each job."""


class JobStore(Protocol):
    """All methods raise StoreUnavailable if the store cannot be reached; nothing is half done then.

    A call that failed so may be repeated: repeating a call that took effect changes nothing.
    """

    is_shared: bool
    """Whether jobs outlive this process, and other processes may claim them."""
    changes: "Changes"
    worker_id: str
    """The id of this process' worker, if it has one."""

    @property
    def clock(self) -> Callable[[], float]:
        """Unix seconds, by one clock for all processes that share the store. All times of jobs are by it."""
        ...

    async def open(self, *, on_queued: Callable[[], None], on_cancelled: Callable[[str], None]) -> None:
        """Begin to pass on changes, also from other processes.

        From now on `on_queued` is called when this process should try to claim, and `on_cancelled` with the id of each
        job that it has claimed and that is cancelled.
        """
        ...

    async def close(self) -> None: ...

    async def check(self) -> None:
        """Raise StoreUnavailable if the store or its results cannot be reached, or refuse to write."""
        ...

    async def add(self, job: Job, idempotency: Idempotency | None = None) -> Job:
        """Queue a job, or return the job that this key created before. Raises IdempotencyKeyReused."""
        ...

    async def find(self, idempotency: Idempotency) -> Job | None:
        """The job that this key created before, if any. Raises IdempotencyKeyReused if the fingerprints differ."""
        ...

    async def get(self, job_id: str) -> JobSnapshot:
        """The job, perhaps without its input images. Raises JobNotFound."""
        ...

    async def content(self, job_id: str) -> FinishedJob:
        """A succeeded job with its artifacts. Raises JobNotFound, JobNotFinished, ResultExpired."""
        ...

    async def claim(self, fits: Fits) -> Claim | None:
        """Set the first waiting job that `fits` running, in the order of `Job.place`.

        `fits` is asked once for each kind, of about the MOST_KINDS earliest.

        A store that other processes share may answer None without a look at the queue. It calls `on_queued` when a look
        is worth it.
        """
        ...

    async def renew(self, claims: Sequence[Claim]) -> set[str]:
        """Prolong leases. Returns the ids of jobs whose leases are lost."""
        ...

    async def record(self, progress: Progress) -> None:
        """Store a running job's progress. Nothing happens if the lease is lost."""
        ...

    async def add_preview(self, preview: Preview) -> None:
        """Add a preview to a running job's events. Nothing happens if the lease is lost."""
        ...

    async def end(self, ending: Ending) -> JobSnapshot | None:
        """End a claimed job; None if the lease was lost or the job had ended before."""
        ...

    async def release(self, claim: Claim) -> None:
        """Return a job to its place in the queue. Nothing happens if the lease is lost."""
        ...

    async def cancel(self, job_id: str) -> tuple[JobSnapshot, bool]:
        """The job, and whether this call cancelled it. A job that has ended stays as it is. Raises JobNotFound."""
        ...

    async def fail(self, job_id: str, failure: Failure) -> JobSnapshot | None:
        """End a job that no worker holds; None if it had ended before."""
        ...

    async def recover(self) -> Recovery:
        """Queue the jobs of dead workers again; fail the jobs that were claimed too often."""
        ...

    async def take_webhook(self) -> tuple[JobSnapshot, int] | None:
        """An ended job whose webhook is due, and how often it was taken before.

        No other call gets it for WEBHOOK_HELD_S.
        """
        ...

    async def settle_webhook(self, job_id: str, retry_in_s: float | None) -> None:
        """Make a webhook that was taken due again in `retry_in_s`; None is never."""
        ...

    async def events(self, job_id: str, after: str) -> list[Event]:
        """The events of a job after the event `after`. Raises JobNotFound."""
        ...

    async def live_jobs(self) -> list[JobSnapshot]:
        """Queued and running jobs."""
        ...

    async def jobs(self, owner: str | None, *, limit: int, before: str | None = None) -> list[JobSnapshot]:
        """The jobs of an API key, or of all if `owner` is None, newest first: those that came before the job `before`.

        Jobs that can't be read are left out. Raises JobNotFound if there is no job `before`.
        """
        ...

    async def positions(self, job_ids: Sequence[str]) -> list[int | None]:
        """How many queued jobs of the same model are claimed before each of these; None unless it is queued."""
        ...

    async def load(self, owner: str | None = None) -> Load:
        """The work that is left, and how much of it `owner` has. Its time does not depend on the number of jobs."""
        ...

    async def announce(self, record: WorkerRecord) -> None:
        """Say what this worker is and does. It counts as living until its leases would end."""
        ...

    async def withdraw(self) -> None:
        """This worker has ended."""
        ...

    async def workers(self) -> list[WorkerRecord]:
        """The living workers. A record that this version can't read is left out."""
        ...


@dataclass(slots=True)
class Changes:
    """Wakes the tasks of this process that wait for news of a job.

    `on_first` is called with a job's id when the first of them begins to wait for it, `on_last` when the last one ends.
    """

    on_first: Callable[[str], None] = lambda job_id: None
    on_last: Callable[[str], None] = lambda job_id: None
    _waiting: dict[str, set[asyncio.Event]] = field(default_factory=dict)

    def notify(self, job_id: str) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()

    @contextmanager
    def of(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job changes."""
        changed = asyncio.Event()
        if job_id not in self._waiting:
            self.on_first(job_id)
        self._waiting.setdefault(job_id, set()).add(changed)
        try:
            yield changed
        finally:
            self._waiting[job_id].discard(changed)
            if not self._waiting[job_id]:
                del self._waiting[job_id]
                self.on_last(job_id)


async def follow(store: JobStore, job_id: str, after: str = BEGINNING) -> AsyncIterator[Event]:
    """The events of a job after the event `after`, as they happen, up to its end. Raises JobNotFound.

    Retries an unreachable store for a minute, then raises StoreUnavailable.
    """
    began_after, lost_since, has_ended = after, None, False
    with store.changes.of(job_id) as changed:
        while True:
            changed.clear()
            try:
                events = await store.events(job_id, after)
                if not events and has_ended:
                    # Its events have been deleted. A caller that begins after some event may have seen the end.
                    if after != began_after or after == BEGINNING:
                        yield Event(END_ALONE, EventName.ENDED, {"status": (await store.get(job_id)).state.status})
                    return
                # The next round reads the event of an end that came between the two calls.
                has_ended = not events and (await store.get(job_id)).state.status.is_terminal
                lost_since = None
            except StoreUnavailable:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > _RETRY_S:
                    raise
                events = []
            for event in events:
                yield event
                after = event.id
                if event.name is EventName.ENDED:
                    return
            if has_ended:
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await changed.wait()


async def ended(store: JobStore, job_id: str) -> JobSnapshot:
    """Wait until the job has ended. Raises JobNotFound."""
    async for _ in follow(store, job_id):
        pass
    return await store.get(job_id)
