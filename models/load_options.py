"""How the models of a process are loaded. Plain data: it imports nothing that computes."""

from dataclasses import dataclass
from enum import StrEnum


class Offload(StrEnum):
    """What stays on the CPU, so that a device with less memory is enough."""

    NONE = "none"
    TEXT_ENCODERS = "text_encoders"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options that hold for all models of a process.

    `prompt_cache_bytes` is how much of the host's memory embedded prompts may take together.
    """

    offload: Offload = Offload.NONE
    prompt_cache_bytes: int = 256_000_000

    @property
    def offloads_text_encoders(self) -> bool:
        return self.offload is not Offload.NONE


DEFAULTS = LoadOptions()
