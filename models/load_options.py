"""How the models of a process are loaded. Plain data: it imports nothing that computes."""

from dataclasses import dataclass
from enum import StrEnum


class Offload(StrEnum):
    """What stays on the CPU, so that a device with less memory is enough."""

    NONE = "none"
    TEXT_ENCODERS = "text_encoders"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options that hold for all models of a process."""

    offload: Offload = Offload.NONE
    device_memory: int | None = None
    """The most bytes of the device to use; None for all that it has, and for no limit on a CPU."""

    @property
    def offloads_text_encoders(self) -> bool:
        return self.offload is not Offload.NONE


DEFAULTS = LoadOptions()
