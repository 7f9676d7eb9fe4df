"""How the models of a process are loaded. Plain data: it imports nothing that computes."""

from dataclasses import dataclass
from enum import StrEnum


class Weights(StrEnum):
    """How weights are stored. With `AUTO` and `FLOAT8` models compute in float32 on a CPU, else in bfloat16."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT8 = "float8"


class Offload(StrEnum):
    """What stays on the CPU, so that a device with less memory is enough. With `LAYERS`, text encoders stay as well."""

    NONE = "none"
    TEXT_ENCODERS = "text_encoders"
    LAYERS = "layers"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options that hold for all models of a process."""

    offload: Offload = Offload.NONE
    weights: Weights = Weights.AUTO

    @property
    def offloads_text_encoders(self) -> bool:
        return self.offload is not Offload.NONE

    @property
    def offloads_layers(self) -> bool:
        return self.offload is Offload.LAYERS

    @property
    def has_float8(self) -> bool:
        return self.weights is Weights.FLOAT8


DEFAULTS = LoadOptions()
