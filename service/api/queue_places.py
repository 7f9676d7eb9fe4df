"""Where queued jobs are in the queue, for their views and for their streams of events."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from service.errors import StoreUnavailable
from service.jobs.job import Job, JobSnapshot, JobStatus
from service.jobs.store import JobStore
from service.running.fleet import Fleet
from service.scheduling.fleet import Load, WorkerRecord
from service.scheduling.waiting import QueuePlace, place_of

UPDATE_S = 2.0
"""How often a stream looks whether the place of its job has changed."""


async def queue_places(snapshots: Sequence[JobSnapshot], store: JobStore, fleet: Fleet) -> list[QueuePlace | None]:
    """The place of each job; None unless it is queued. Raises StoreUnavailable."""
    queued = [snapshot.job for snapshot in snapshots if snapshot.state.status is JobStatus.QUEUED]
    positions = dict(zip((job.id for job in queued), await store.positions([job.id for job in queued]), strict=True))
    if all(position is None for position in positions.values()):
        return [None] * len(snapshots)
    load = await store.load()
    return [_place(snapshot.job, positions.get(snapshot.job.id), load, fleet.workers) for snapshot in snapshots]


async def queue_place(snapshot: JobSnapshot, store: JobStore, fleet: Fleet) -> QueuePlace | None:
    """The place of one job; None unless it is queued. Raises StoreUnavailable."""
    return (await queue_places([snapshot], store, fleet))[0]


def _place(job: Job, position: int | None, load: Load, workers: Sequence[WorkerRecord]) -> QueuePlace | None:
    return None if position is None else place_of(job.model, job.predicted_seconds, position, load, workers)


@dataclass(slots=True)
class QueueWatch:
    """The place of one job, as the stream of its events tells it. `is_queued` may be out of date."""

    job: Job
    store: JobStore
    fleet: Fleet
    is_queued: bool = True
    _position: int | None = None

    async def place(self) -> dict[str, Any]:
        """The fields of the event that the job is queued; none if it is no longer, or while the store is away."""
        self._position = None
        return await self.change()

    async def change(self) -> dict[str, Any]:
        """These fields if the position is another than the last one told, else none."""
        with suppress(StoreUnavailable):
            (position,) = await self.store.positions([self.job.id])
            self.is_queued = position is not None
            if position is not None and position != self._position:
                load = await self.store.load()
                self._position = position
                return queue_fields(
                    place_of(self.job.model, self.job.predicted_seconds, position, load, self.fleet.workers)
                )
        return {}


def queue_fields(place: QueuePlace) -> dict[str, Any]:
    return {"position": place.position, "eta_s": None if place.eta_s is None else round(place.eta_s, 3)}
