"""How the models of a process are loaded. Plain data: it imports nothing that computes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Self

from models.errors import WeightsError


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
class Lora:
    """A low-rank adapter: its safetensors file, and the factor by which it is added to the weights."""

    file: Path
    scale: float = 1.0

    @classmethod
    def at(cls, place: str) -> Self:
        """The adapter in a file whose name may be followed by @ and a scale."""
        file, _, scale = place.rpartition("@")
        if not re.fullmatch(r"-?\d+(\.\d+)?", scale):  # a path may have an @
            file, scale = place, "1"
        return cls(Path(file).absolute(), float(scale))


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options that hold for all models of a process.

    `loras` has adapters by name. The model `flux-dev+style` is that in the directory `flux-dev` with the adapter
    `style` in its weights. `prompt_cache_bytes` is how much of the host's memory embedded prompts may take together.
    `compiles` says whether blocks are compiled. `device_memory` is the most bytes of the device to use, None for all
    that it has, and for no limit on a CPU.
    """

    offload: Offload = Offload.NONE
    weights: Weights = Weights.AUTO
    loras: Mapping[str, Lora] = field(default_factory=dict)
    prompt_cache_bytes: int = 256_000_000
    compiles: bool = False
    device_memory: int | None = None

    @property
    def offloads_text_encoders(self) -> bool:
        return self.offload is not Offload.NONE

    @property
    def offloads_layers(self) -> bool:
        return self.offload is Offload.LAYERS

    @property
    def has_float8(self) -> bool:
        return self.weights is Weights.FLOAT8

    def source(self, model: Path) -> tuple[Path, Mapping[str, Lora]]:
        """The directory of a model, and the adapters to add to its weights, by name.

        `model` is a directory, or ends in the names of adapters: `/models/flux-dev+style+detail`. Raises
        WeightsError if there is no such adapter.
        """
        if model.is_dir():
            return model, {}
        base, *names = model.name.split("+")
        if unknown := [name for name in names if name not in self.loras]:
            raise WeightsError(f"{model} names no adapter '{unknown[0]}'; there are: {', '.join(self.loras) or 'none'}")
        return model.with_name(base), {name: self.loras[name] for name in names}


DEFAULTS = LoadOptions()
