"""The parts of a worker that its starts, its steps and its decodings share."""

from collections.abc import Callable
from dataclasses import dataclass

from service.metrics import Metrics
from service.running.device_use import DeviceUse
from service.running.publisher import Publisher
from service.running.room import Room
from service.scheduling.batching import FairShare
from service.scheduling.precedence import Precedence


@dataclass(frozen=True, slots=True)
class WorkerParts:
    """`fair_share` and `precedence` are told all seconds of the device that its requests take."""

    metrics: Metrics
    publisher: Publisher
    room: Room
    device: DeviceUse
    fair_share: FairShare
    precedence: Precedence
    clock: Callable[[], float]
