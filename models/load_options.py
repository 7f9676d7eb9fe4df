"""How the models of a process are loaded. Plain data: it imports nothing that computes."""

from dataclasses import dataclass
from enum import StrEnum


class Offload(StrEnum):
    """What stays on the CPU, so that a device with less memory is enough."""

    NONE = "none"
    TEXT_ENCODERS = "text_encoders"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options that hold for all models of a process. `compiles` says whether blocks are compiled."""

    offload: Offload = Offload.NONE
    compiles: bool = False

    @property
    def offloads_text_encoders(self) -> bool:
        return self.offload is not Offload.NONE


DEFAULTS = LoadOptions()
