"""Which requests a worker has room for: by their number, by their shape, and in the device's memory."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.card import ModelCard
from models.memory import ModelMemory, RequestMemory
from service.jobs.store import JobKind
from service.running.held import HeldJob, Running
from service.running.publisher import Publisher
from service.scheduling.batching import is_light, most_at_once, step_shape
from service.scheduling.cost import grid_bytes
from service.scheduling.memory import DeviceMemory, InMemory

_SHARE_FOR_URGENT = 8
"""One in so many of the places for running requests is kept for urgent ones, and as many for all others."""
_SHARE_FOR_LIGHT = 4
"""One in so many of the places is kept for light requests, and for urgent ones."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """At most `max_batch_size` requests share a step, and at most `max_running` are in memory.

    The grids of meshes that are decoded at once take at most `max_decode_bytes`, as predicted. A larger one goes alone.
    """

    max_batch_size: int
    max_running: int
    max_decode_bytes: int


class Room:
    """Used under the worker's lock, which protects what is passed in. `cards` are those of all loaded models."""

    def __init__(self, limits: WorkerLimits, publisher: Publisher) -> None:
        self.cards: Mapping[str, ModelCard] = {}
        self._limits = limits
        self._publisher = publisher

    def is_large_enough(self, memory: RequestMemory) -> bool:
        """Whether this worker's device could run such a request alone."""
        return memory.alone <= self._memory.room

    def has_place(self, new: JobKind, waiting: Sequence[HeldJob], running: Sequence[Running]) -> bool:
        """Whether the limits of numbers allow one more, if one of each of `waiting` had started.

        An urgent one does not wait for others to end: they leave room for it, and it does not count them among those of
        its shape. Nor does a light one wait for others than light ones. Urgent ones leave room for others, too.
        """
        held = [*waiting, *(other.held for other in running)]
        if self.is_full(len(held)):
            return False
        num_alike = sum(other.job.is_urgent is new.is_urgent for other in held)
        kept = self._num_kept
        most = self._limits.max_running - kept
        if new.is_urgent:
            has_place = num_alike < most
        else:
            if not is_light(new.shape):
                most -= most // _SHARE_FOR_LIGHT
            has_place = num_alike < kept or len(held) + self._publisher.num_unfinished < most
        rivals = sum(other.shape == new.shape and (other.job.is_urgent or not new.is_urgent) for other in held)
        return has_place and rivals < most_at_once(new.shape, self.max_batch_size(new.model))

    @property
    def keeps_places(self) -> bool:
        """Whether there are places enough to keep some for urgent requests."""
        return self._num_kept > 0

    @property
    def _num_kept(self) -> int:
        return self._limits.max_running // _SHARE_FOR_URGENT

    def is_full(self, num_held: int) -> bool:
        """Whether the worker has no place for one more request beside those that wait or run, whatever it is."""
        return num_held + self._publisher.num_unfinished >= self._limits.max_running

    def has_memory(self, new: JobKind, waiting: Sequence[HeldJob], running: Sequence[Running]) -> bool:
        """Whether the device's memory allows one more. An urgent one may step without others of its shape."""
        entries = [*(InMemory(step_shape(held.shape), held.memory) for held in waiting), *map(_entry, running)]
        max_batch_size = 1 if new.is_urgent else self.max_batch_size(new.model)
        return self._device(entries).can_start(InMemory(step_shape(new.shape), new.memory), max_batch_size)

    def max_batch_size(self, model: str) -> int:
        return min(self._limits.max_batch_size, self.cards[model].max_batch_size)

    def cut(self, batch: Sequence[Running], running: Sequence[Running]) -> Sequence[Running]:
        """As many of the batch as may step now. None of them: the first has to wait for a decoding to end."""
        device = self._device(list(map(_entry, running)))
        if batch[0].decoding is not None:
            return batch if device.can_turn(batch[0].memory.decode) else []
        most = min(self.max_batch_size(batch[0].job.model), device.num_that_fit([other.memory for other in batch]))
        return batch[:most]

    def for_grid(self, running: Running, others: Sequence[Running]) -> bool:
        """Whether the grid of a mesh may be decoded beside those that are."""
        grids = sum(other.grid_bytes for other in others)
        return not grids or grids + grid_bytes(running.request) <= self._limits.max_decode_bytes

    def for_decoding(self, running: Running, others: Sequence[Running]) -> bool:
        """Whether the publisher may decode this result now."""
        device = self._device(list(map(_entry, others)))
        return device.can_decode(running.job.model, running.memory.decode)

    def for_preview(self, running: Running, others: Sequence[Running]) -> bool:
        """Whether the publisher may decode a preview now."""
        device = self._device(list(map(_entry, others)))
        return device.can_preview(running.job.model, running.memory.preview)

    def kinds(self, running: Sequence[Running]) -> dict[str, int]:
        """What is planned of the device, by kind, for metrics; empty where nothing limits it."""
        if not self.cards or math.isinf((memory := self._memory).limit):
            return {}
        return {
            "limit": int(memory.limit),
            "reserve": int(memory.reserve),
            "weights": memory.all_weights,
            "running": self._device(list(map(_entry, running))).held,
        }

    @property
    def _memory(self) -> ModelMemory:
        """That of any model: they share the device."""
        return next(iter(self.cards.values())).memory

    def _device(self, entries: Sequence[InMemory]) -> DeviceMemory:
        return DeviceMemory(self._memory.room, self._limits.max_decode_bytes, entries, self._publisher.decoding)


def _entry(running: Running) -> InMemory:
    return InMemory(step_shape(running.held.shape), running.memory, running.state.is_done)
