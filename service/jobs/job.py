"""A job: the images or the mesh of one API call, from the queue to the result."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

from models.memory import NO_MEMORY, RequestMemory
from models.report import GenerationSummary, MeshReport, StepDecision
from models.request import ImageRequest, MeshRequest
from service.jobs.traces import pack, unpack
from service.order import Output, pictures_of, with_pictures


class JobStatus(StrEnum):
    QUEUED = "queued"  # accepted, waits for room in a batch
    RUNNING = "running"  # claimed by a worker; returns to the queue if the worker releases it or dies
    SUCCEEDED = "succeeded"  # all its artifacts are stored
    FAILED = "failed"  # `failure` says why
    CANCELLED = "cancelled"  # its client no longer wants it

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: Mapping[JobStatus, frozenset[JobStatus]] = {
    JobStatus.QUEUED: frozenset({JobStatus.RUNNING, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.RUNNING: frozenset({JobStatus.QUEUED, JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED}),
    JobStatus.SUCCEEDED: frozenset(),
    JobStatus.FAILED: frozenset(),
    JobStatus.CANCELLED: frozenset(),
}


class IllegalTransition(Exception):
    pass


class Priority(StrEnum):
    """Jobs of a higher priority are claimed first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


_RANKS = {priority: rank for rank, priority in enumerate(Priority)}
_DUE_IN_S = 60.0
"""When a job without `due_at` and deadline is due. Earlier versions recorded no `due_at`."""


class FailureReason(StrEnum):
    INVALID_REQUEST = "invalid_request"  # the engine refused the request
    GENERATION_FAILED = "generation_failed"  # an error of ours
    DRAINING = "draining"  # the server shut down before the job was finished
    WORKER_LOST = "worker_lost"  # every worker that claimed it died


@dataclass(frozen=True, slots=True)
class Failure:
    reason: FailureReason
    message: str
    param: str | None = None

    @classmethod
    def worker_lost(cls, job_id: str, attempts: int) -> Self:
        tried = f"all {attempts} workers that tried it died" if attempts > 1 else "its worker died"
        return cls(FailureReason.WORKER_LOST, f"job {job_id} failed: {tried}")


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """How long the stages of one artifact took. `total` is from the job's arrival to the encoded file."""

    queue: float
    encode: float
    denoise: float
    decode: float
    total: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one artifact got.

    `batch_size_mean` is the mean over its computed steps. `quality_requested` is None for a compute ratio or a
    deadline, `mesh` None for an image, `deadline_met` None without a deadline. `trace` has the decisions of a traced
    request once they are packed, and the summary has none then.
    """

    summary: GenerationSummary
    quality_requested: float | None
    seconds: StageSeconds
    batch_size_mean: float
    mesh: MeshReport | None = None
    is_degraded: bool = False
    deadline_met: bool | None = None
    trace: str | None = None

    @property
    def decisions(self) -> tuple[StepDecision, ...] | None:
        """The decisions of all blocks, in the order of their steps; None if the request was not traced."""
        return self.summary.decisions if self.trace is None else unpack(self.trace)

    def without_decisions(self) -> Self:
        return replace(self, summary=replace(self.summary, decisions=None), trace=None)

    def with_packed_trace(self) -> Self:
        """This receipt with its decisions compressed."""
        if self.summary.decisions is None:
            return self
        return replace(self, summary=replace(self.summary, decisions=None), trace=pack(self.summary.decisions))


@dataclass(frozen=True, slots=True)
class Job:
    """What was asked and what was promised; nothing of it changes after submission. Times are Unix seconds.

    `predicted_seconds` is the cost that admission counted, `decode_seconds` the part of it after the last step, which
    only meshes have. `request_id` names the API call in logs, `owner` the API key
    that created the job, None without keys. `is_degraded` says that load has lowered the quality. `num_previews` is how
    many previews of the unfinished result its events get. `memory` is what each of its requests takes of the device.
    `due_at` gives its place in the queue, see `scheduling.queueing`.
    """

    id: str
    model: str
    requests: tuple[ImageRequest | MeshRequest, ...]
    output: Output
    priority: Priority
    quality_requested: float | None
    predicted_seconds: float
    request_id: str
    created_at: float
    decode_seconds: float = 0.0
    owner: str | None = None
    deadline_at: float | None = None
    is_degraded: bool = False
    num_previews: int = 0
    webhook_url: str | None = None
    memory: RequestMemory = NO_MEMORY
    due_at: float | None = None

    @property
    def place(self) -> float:
        """Its place in the queue, lowest first: by priority, then by when it is due.

        In milliseconds, which a double holds exactly.
        """
        due = next(due for due in (self.due_at, self.deadline_at, self.created_at + _DUE_IN_S) if due is not None)
        return float(_RANKS[self.priority] * 2**44 + round(due * 1000))

    @property
    def is_urgent(self) -> bool:
        """Whether it has high priority or a deadline.

        Then it does not wait for others to end, and its prompt is encoded, and its file made, before theirs.
        """
        return self.is_high or self.deadline_at is not None

    @property
    def is_high(self) -> bool:
        return self.priority is Priority.HIGH

    @property
    def num_steps(self) -> int:
        """Computed steps of all its requests, as expected before its start."""
        return sum(request.num_computed_steps for request in self.requests)

    def seconds_left(self, steps_done: int, num_steps: int) -> float:
        """Predicted seconds of work after `steps_done` of its `num_steps` computed steps."""
        denoise_s = self.predicted_seconds - self.decode_seconds
        return denoise_s * (1 - steps_done / num_steps) + self.decode_seconds

    def with_input_images(self, pictures: Sequence[bytes]) -> Self:
        """This job with these image files in each of its requests."""
        return replace(self, requests=tuple(with_pictures(request, pictures) for request in self.requests))

    def without_input_images(self) -> Self:
        """This job with empty image files, which may be megabytes."""
        return self.with_input_images([b"" for _ in pictures_of(self.requests[0])])


@dataclass(frozen=True, slots=True)
class JobState:
    """What changes while a job waits and runs. Times are Unix seconds.

    `steps_done` counts the computed steps of all requests; `num_steps` is their number in all as things stand, None
    before the first progress. `compute_ratio` is the share of the dense compute so far. `attempts` counts the workers
    that claimed the job and did not release it. A succeeded job has a receipt for each request, and `content`, the key
    of its artifacts in the results.
    """

    status: JobStatus = JobStatus.QUEUED
    started_at: float | None = None
    ended_at: float | None = None
    steps_done: int = 0
    num_steps: int | None = None
    compute_ratio: float | None = None
    attempts: int = 0
    receipts: tuple[Receipt, ...] = ()
    failure: Failure | None = None
    content: str | None = None

    def moved_to(self, status: JobStatus) -> Self:
        """This state with another status. Raises IllegalTransition for a move that TRANSITIONS does not list."""
        if status not in TRANSITIONS[self.status]:
            raise IllegalTransition(f"a job cannot go from {self.status} to {status}")
        return replace(self, status=status)


@dataclass(frozen=True, slots=True)
class JobSnapshot:
    """A job with its state at one moment."""

    job: Job
    state: JobState

    @property
    def num_steps(self) -> int:
        """Computed steps of all its requests, as things stand."""
        if self.state.receipts:
            return sum(receipt.summary.num_steps_computed for receipt in self.state.receipts)
        return self.state.num_steps or self.job.num_steps

    @property
    def remaining_seconds(self) -> float:
        """Predicted seconds of work that are left."""
        return self.job.seconds_left(self.state.steps_done, self.num_steps)


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """An ended job with its artifacts: an encoded file for each request, none unless it succeeded."""

    job: Job
    state: JobState
    artifacts: tuple[bytes, ...]


def log_fields(job: Job) -> dict[str, str]:
    """The `extra` of every log line about a job."""
    return {"job_id": job.id, "request_id": job.request_id}
