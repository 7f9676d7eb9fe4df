"""How long queued jobs wait: the backlog of a model, the workers that it needs, the place and end of a job. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from service.scheduling.fleet import Load, WorkerRecord, WorkerState, seconds_before


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """`position` jobs of the same model come first. `eta_s` seconds are left until the job ends, as predicted.

    `eta_s` is None while no worker has the model.
    """

    position: int
    eta_s: float | None


def pace_of(model: str, workers: Sequence[WorkerRecord]) -> float | None:
    """The mean pace of the workers of `model` that take jobs; None if there is none."""
    paces = [worker.pace for worker in workers if model in worker.cards and worker.state is not WorkerState.DRAINING]
    return fmean(paces) if paces else None


def backlog_s(model: str, load: Load, workers: Sequence[WorkerRecord]) -> float:
    """Seconds of work in all jobs of `model`, at its workers' mean pace. One worker alone would take this long."""
    return load.of(model).backlog_s * (pace_of(model, workers) or 1.0)


def wanted_workers(model: str, load: Load, workers: Sequence[WorkerRecord], target_s: float) -> int:
    """How many workers finish the backlog of `model` in `target_s`; never fewer than those that are busy.

    Autoscalers choose themselves which workers end, and do not spare busy ones.
    """
    num_busy = sum(worker.state is WorkerState.BUSY for worker in workers if model in worker.cards)
    return max(math.ceil(backlog_s(model, load, workers) / target_s), num_busy)


def place_of(model: str, job_s: float, position: int, load: Load, workers: Sequence[WorkerRecord]) -> QueuePlace:
    """The place of a queued job: `position` jobs of its model come first, and it takes `job_s` predicted seconds.

    Queued jobs of one model count as equally long. An equal share of other models' queues counts as earlier, since
    workers may serve these too. For the last job that is all of them.
    """
    num_queued = max(load.of(model).num_queued, position + 1)
    shares = {name: (position + 1) / num_queued for name in load.models} | {model: position / num_queued}
    earlier = replace(
        load,
        models={name: replace(of, queued_s=of.queued_s * shares[name]) for name, of in load.models.items()},
    )
    wait_s, pace = seconds_before(model, earlier, workers), pace_of(model, workers)
    return QueuePlace(position, None if pace is None else wait_s + job_s * pace)
