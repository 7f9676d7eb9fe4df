"""What every job store can do, and how a job's events are followed.

A store is used by one event loop. What several processes share through one (Redis) keeps the same contract as the
memory of a single process: every method is atomic, and whoever ends a job first has decided.
"""

import asyncio
import base64
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from service.errors import StoreUnavailable
from service.jobs.job import Failure, Job, JobStatus, Outcome, Receipt

# A notice that was lost with its connection is made up for by looking again.
_LOOK_AGAIN_S = 1.0
# How long whoever follows a job bears with a store that can't be reached.
_PATIENCE_S = 60.0
_BEGINNING = "0-0"
WEBHOOK_HELD_S = 60.0


class EventName(StrEnum):
    QUEUED = "job.queued"
    STARTED = "job.started"
    PROGRESS = "job.progress"
    PREVIEW = "job.preview"  # the public name depends on what is made
    ENDED = "job.ended"  # likewise


@dataclass(frozen=True, slots=True)
class Event:
    """`id` is two numbers with a hyphen, rising with each event of a job; `data` is JSON."""

    id: str
    name: EventName
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A client's promise that all calls of `owner` with this `key` mean the same; `fingerprint` is of what it asks."""

    owner: str
    key: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that a worker makes, for as long as it renews its `lease`, a name that is never used again."""

    job: Job
    lease: str


@dataclass(frozen=True, slots=True)
class Progress:
    """`steps_done` of all pictures, and what stands in the job's next progress event."""

    claim: Claim
    steps_done: int
    compute_ratio: float
    eta_s: float

    @property
    def event_data(self) -> dict[str, Any]:
        job = self.claim.job
        return {
            "step": self.steps_done // len(job.requests),
            "num_inference_steps": job.requests[0].num_inference_steps,
            "compute_ratio": round(self.compute_ratio, 6),
            "eta_s": round(self.eta_s, 3),
        }


@dataclass(frozen=True, slots=True)
class Preview:
    """The `file` of picture `index` as far as it can be told; number `number` of those."""

    claim: Claim
    index: int
    number: int
    file: bytes

    @property
    def event_data(self) -> dict[str, Any]:
        b64_json = base64.b64encode(self.file).decode("ascii")
        return {"b64_json": b64_json, "partial_image_index": self.number, "index": self.index}


@dataclass(frozen=True, slots=True)
class Ending:
    """How a claimed job ended. `files` are its results."""

    claim: Claim
    status: JobStatus
    failure: Failure | None = None
    receipts: tuple[Receipt, ...] = ()
    files: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was done about jobs whose workers died: `requeued` ids, and the jobs that were given up."""

    requeued: tuple[str, ...] = ()
    failed: tuple[Job, ...] = ()


Fits = Callable[[str, str], bool]
"""Whether there is room for a job of this model and shape (`scheduling.batching.shape_of`)."""


class JobStore(Protocol):
    """All methods raise StoreUnavailable when the store can't be reached; nothing is half done then.

    A call that failed so may be repeated: repeating one that took effect changes nothing.
    """

    is_shared: bool
    """Whether jobs outlive this process, and others may claim them."""
    changes: "Changes"

    async def open(self) -> None:
        """Begin to pass on the changes that other processes make."""
        ...

    async def close(self) -> None: ...

    async def check(self) -> None:
        """Raise StoreUnavailable if the store can't be reached."""
        ...

    async def add(self, job: Job, idempotency: Idempotency | None = None) -> Job:
        """Queue a job; or return the one that this key made before. Raises IdempotencyKeyReused for another body."""
        ...

    async def find(self, idempotency: Idempotency) -> Job | None:
        """The job that this key made before, if any. Raises IdempotencyKeyReused for another body."""
        ...

    async def get(self, job_id: str) -> Job:
        """The job; pictures of mesh requests may be missing. Raises JobNotFound."""
        ...

    async def content(self, job_id: str) -> Outcome:
        """A succeeded job's files. Raises JobNotFound, JobNotFinished, ResultExpired."""
        ...

    async def claim(self, fits: Fits) -> Claim | None:
        """The first waiting job that `fits`, now running: by priority, then by deadline, then by arrival."""
        ...

    async def renew(self, claims: Sequence[Claim]) -> set[str]:
        """Prolong leases, and show that this worker lives. Returns the ids of jobs that are no longer the worker's."""
        ...

    async def record(self, progress: Progress) -> None:
        """Note a running job's progress. Nothing happens if the lease is lost."""
        ...

    async def add_preview(self, preview: Preview) -> None:
        """Likewise."""
        ...

    async def end(self, ending: Ending) -> Job | None:
        """The job as it has ended; None if the lease was lost or the job had ended before."""
        ...

    async def release(self, claim: Claim) -> None:
        """Put a job back to its place in the queue. Nothing happens if the lease is lost."""
        ...

    async def cancel(self, job_id: str) -> tuple[Job, bool]:
        """The job, and whether this call cancelled it: one that has ended stays as it is. Raises JobNotFound."""
        ...

    async def fail(self, job_id: str, failure: Failure) -> Job | None:
        """End a job that nobody makes; None if it had ended before."""
        ...

    async def recover(self) -> Recovery:
        """Queue the jobs of dead workers again, or fail those that were claimed too often."""
        ...

    async def take_webhook(self) -> tuple[Job, int] | None:
        """An ended job whose webhook is due, and how often it was taken before. Nobody else gets it for a minute."""
        ...

    async def settle_webhook(self, job_id: str, retry_in_s: float | None) -> None:
        """The webhook that was taken is due again in so many seconds, or done."""
        ...

    async def events(self, job_id: str, after: str) -> list[Event]:
        """What happened to a job after the event `after`; "0-0" is before all. Raises JobNotFound."""
        ...

    async def live_jobs(self) -> list[Job]:
        """Queued and running jobs."""
        ...

    async def backlog_s(self) -> float:
        """Predicted seconds of work in all queued and running jobs, for each worker that lives."""
        ...

    async def num_waiting(self) -> Counter[str]:
        """How many jobs of each model are queued."""
        ...


@dataclass(slots=True)
class Changes:
    """Tells this process's waiting sides that something happened, here or in another process."""

    on_queued: Callable[[], None] = lambda: None
    on_cancelled: Callable[[str], None] = lambda job_id: None
    _waiting: dict[str, set[asyncio.Event]] = field(default_factory=dict)

    def notify(self, job_id: str) -> None:
        for event in self._waiting.get(job_id, ()):
            event.set()

    @contextmanager
    def of(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever something happens to this job."""
        changed = asyncio.Event()
        self._waiting.setdefault(job_id, set()).add(changed)
        try:
            yield changed
        finally:
            self._waiting[job_id].discard(changed)
            if not self._waiting[job_id]:
                del self._waiting[job_id]


async def follow(store: JobStore, job_id: str, after: str = _BEGINNING) -> AsyncIterator[Event]:
    """A job's events after `after`, as they come, up to its end. Raises JobNotFound.

    While the store can't be reached it waits, and raises StoreUnavailable only if that lasts.
    """
    lost_since: float | None = None
    has_ended = False
    with store.changes.of(job_id) as changed:
        while True:
            changed.clear()
            try:
                events = await store.events(job_id, after)
                if not events and has_ended:
                    if after == _BEGINNING:  # its events are forgotten already
                        yield Event("0-1", EventName.ENDED, {"status": (await store.get(job_id)).status})
                    return
                # An end that came between the two is read in the next round.
                has_ended = not events and (await store.get(job_id)).status.is_terminal
                lost_since = None
            except StoreUnavailable:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > _PATIENCE_S:
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
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await changed.wait()


async def ended(store: JobStore, job_id: str) -> Job:
    """The job, once it has ended. Raises JobNotFound."""
    async for _ in follow(store, job_id):
        pass
    return await store.get(job_id)
