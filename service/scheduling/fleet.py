"""The workers that share a queue, and the work that waits for them. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from models.card import ModelCard

LEAST_JOB_S = 1.0
"""The least work that a running job counts as: it may have no steps left and still make its file."""


class WorkerState(StrEnum):
    """What a living worker does. A worker is one process with one device."""

    IDLE = "idle"  # it waits for jobs
    BUSY = "busy"  # it holds jobs
    DRAINING = "draining"  # it finishes the jobs that it holds, and takes no more


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """What a worker says of itself with each heartbeat.

    `cards` are those of its models, by id; the times and bytes in them were measured on its `device`. `pace` is the
    measured seconds for each predicted one, see `scheduling.pace`. `finish_s` says, by model, how long decoding and
    encoding a result of the default size takes lately; a model without a result yet is not in it. A step takes `step_s`
    lately, at most, and `step_pace` is the pace of steps alone, whatever sharing them saves. `urgent_waits` says
    whether urgent requests may have to wait for others to end. It holds `num_held` of at most `max_running` requests.
    """

    id: str
    version: str
    device: str
    state: WorkerState
    cards: Mapping[str, ModelCard]
    pace: float = 1.0
    finish_s: Mapping[str, float] = field(default_factory=dict)
    num_held: int = 0
    max_running: int = 0
    step_s: float = 0.0
    step_pace: float = 1.0
    urgent_waits: bool = True


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """The queued and the running jobs of one model, and the predicted seconds of work that are left in them.

    `urgent_s` are those of queued and running jobs that are urgent, see `Job.is_urgent`.
    """

    num_queued: int = 0
    num_running: int = 0
    queued_s: float = 0.0
    running_s: float = 0.0
    urgent_s: float = 0.0

    @property
    def seconds(self) -> float:
        return self.queued_s + self.running_s

    @property
    def backlog_s(self) -> float:
        """Predicted seconds that are left, where each running job counts as LEAST_JOB_S at least."""
        return self.queued_s + max(self.running_s, self.num_running * LEAST_JOB_S)


@dataclass(frozen=True, slots=True)
class Load:
    """The work in the store, by model; models without jobs may be missing.

    `image_bytes` is the size of the input images of all queued and running jobs. `own_s` are the predicted seconds
    that are left of the jobs of one API key, for which the load was asked, and `num_owners` is how many keys have any.
    """

    models: Mapping[str, ModelLoad] = field(default_factory=dict)
    image_bytes: int = 0
    own_s: float = 0.0
    num_owners: int = 0

    def of(self, model: str) -> ModelLoad:
        return self.models.get(model, ModelLoad())


def seconds_before(model: str, load: Load, workers: Sequence[WorkerRecord]) -> float:
    """Seconds until a worker of `model` has done the work that is there now, at the workers' measured paces.

    The work of each model is spread evenly over the workers that have it; the result is the mean over the workers of
    `model` that take jobs. It is infinite if there is none.
    """
    able = [worker for worker in workers if worker.state is not WorkerState.DRAINING]
    num_workers = {name: sum(name in worker.cards for worker in able) for name in load.models}
    of_model = [worker for worker in able if model in worker.cards]
    if not of_model:
        return math.inf
    seconds = [
        worker.pace * sum(load.of(name).seconds / num_workers[name] for name in load.models if name in worker.cards)
        for worker in of_model
    ]
    return sum(seconds) / len(seconds)


def urgent_seconds_before(model: str, load: Load, workers: Sequence[WorkerRecord]) -> float:
    """Seconds until any worker of `model` has nothing to do that goes before a new job with a deadline, at most.

    This is the work of urgent jobs, and the steps of others that run when it arrives and when its prompt is encoded.
    Urgent jobs count at the pace of steps, and at their predicted time at least: those with a deadline may use what
    shared steps save. A worker may have twice its even share of them. The result is infinite if there is no worker, or
    if urgent jobs may have to wait for others to end on one.
    """
    able = [worker for worker in workers if worker.state is not WorkerState.DRAINING]
    num_workers = {name: sum(name in worker.cards for worker in able) for name in load.models}
    of_model = [worker for worker in able if model in worker.cards]
    if not of_model or any(worker.urgent_waits for worker in of_model):
        return math.inf
    return max(
        max(1.0, worker.step_pace)
        * sum(load.of(name).urgent_s * min(1.0, 2 / num_workers[name]) for name in load.models if name in worker.cards)
        + 2 * worker.step_s
        for worker in of_model
    )
