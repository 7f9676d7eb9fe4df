"""A job: one API call's pictures or mesh, from the queue to the result."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

from models.report import GenerationSummary, MeshReport
from models.request import ImageRequest, MeshRequest
from service.order import Output


class JobStatus(StrEnum):
    QUEUED = "queued"  # accepted, waiting for room in a batch
    RUNNING = "running"  # claimed by a worker; goes back to the queue when that gives it back or dies
    SUCCEEDED = "succeeded"  # every picture is there
    FAILED = "failed"  # it cannot be made; `failure` says why
    CANCELLED = "cancelled"  # its client does not want it any more

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
    """Who is claimed first."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


_RANKS = {priority: rank for rank, priority in enumerate(Priority)}
_PATIENCE_S = 60.0


class FailureReason(StrEnum):
    INVALID_REQUEST = "invalid_request"  # the engine refused it as asked
    GENERATION_FAILED = "generation_failed"  # something broke
    DRAINING = "draining"  # the server shut down before its turn
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
    """Where one picture's time went. `total` is from the job's arrival until the picture's file was there."""

    queue: float
    encode: float
    denoise: float
    decode: float
    total: float


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one picture or mesh really got.

    `batch_size_mean` is over its steps; `quality_requested` None if none was; `mesh` None of a picture; `deadline_met`
    None without a deadline.
    """

    summary: GenerationSummary
    quality_requested: float | None
    seconds: StageSeconds
    batch_size_mean: float
    mesh: MeshReport | None = None
    is_degraded: bool = False
    deadline_met: bool | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """Times are Unix seconds. `steps_done` counts denoise steps of all pictures; in the end each has a receipt.

    `predicted_seconds` is the cost that admission reckoned with. `request_id` names the API call in logs, `owner` the
    API key that made it, if keys are in use. `is_degraded` says that load lowered its quality. `num_previews` pictures
    of the unfinished result are sent while it is made. `attempts` counts the workers that claimed it, but for those
    that gave it back. `compute_ratio` is the share of the dense compute so far. `content` is where its results are
    kept, once it has succeeded.
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
    owner: str | None = None
    deadline_at: float | None = None
    is_degraded: bool = False
    num_previews: int = 0
    webhook_url: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    status: JobStatus = JobStatus.QUEUED
    steps_done: int = 0
    compute_ratio: float | None = None
    attempts: int = 0
    receipts: tuple[Receipt, ...] = ()
    failure: Failure | None = None
    content: str | None = None

    @property
    def place(self) -> float:
        """Its place in the queue, the lowest being first: by priority, then by deadline.

        Who has no deadline counts as one that could wait for a minute, so that deadlines overtake it only so far. In
        milliseconds, which doubles hold exactly.
        """
        due = self.created_at + _PATIENCE_S if self.deadline_at is None else self.deadline_at
        return float(_RANKS[self.priority] * 2**44 + round(due * 1000))

    @property
    def num_steps(self) -> int:
        return sum(request.num_inference_steps for request in self.requests)

    @property
    def remaining_seconds(self) -> float:
        return self.predicted_seconds * (1 - self.steps_done / self.num_steps)

    def moved_to(self, status: JobStatus) -> Self:
        """This job in `status`. Raises IllegalTransition for a move that TRANSITIONS does not list."""
        if status not in TRANSITIONS[self.status]:
            raise IllegalTransition(f"job {self.id} cannot go from {self.status} to {status}")
        return replace(self, status=status)

    def without_pictures(self) -> Self:
        """This job without the pictures that its meshes are made of, which may be megabytes."""
        return replace(self, requests=tuple(_without_picture(request) for request in self.requests))


def _without_picture(request: ImageRequest | MeshRequest) -> ImageRequest | MeshRequest:
    return replace(request, input_image=b"") if isinstance(request, MeshRequest) else request


@dataclass(frozen=True, slots=True)
class Outcome:
    """An ended job with its pictures' files, none unless it succeeded."""

    job: Job
    pictures: tuple[bytes, ...]


def log_fields(job: Job) -> dict[str, str]:
    """The `extra` of every line that is logged about a job."""
    return {"job_id": job.id, "request_id": job.request_id}
