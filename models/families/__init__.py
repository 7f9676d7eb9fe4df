"""The model families there are, by the class that a model directory names. Nothing is imported until it is used."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from models.families.hunyuan3d.layout import DENOISERS


class FamilyEntry(NamedTuple):
    """A family's name, and where the class is that serves it."""

    name: str
    module: str
    class_name: str

    def load_class(self) -> Any:
        return getattr(importlib.import_module(self.module), self.class_name)


_HUNYUAN3D = FamilyEntry("hunyuan3d", "models.families.hunyuan3d.pipeline", "Hunyuan3DFamily")

FAMILIES: Mapping[str, FamilyEntry] = {
    # A diffusers pipeline directory names its pipeline, Hunyuan3D's config.yaml its denoiser.
    "FluxPipeline": FamilyEntry("flux", "models.families.flux.pipeline", "FluxFamily"),
    "QwenImagePipeline": FamilyEntry("qwen_image", "models.families.qwen_image.pipeline", "QwenImageFamily"),
    **dict.fromkeys(DENOISERS, _HUNYUAN3D),
}
