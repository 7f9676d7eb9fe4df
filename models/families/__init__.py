"""The model families there are, by the class that a pipeline directory names. Nothing is imported until it is used."""

import importlib
from collections.abc import Mapping
from typing import Any

FAMILIES: Mapping[str, tuple[str, str, str]] = {
    # pipeline class: (family, module, class)
    "FluxPipeline": ("flux", "models.families.flux.pipeline", "FluxFamily"),
    "QwenImagePipeline": ("qwen_image", "models.families.qwen_image.pipeline", "QwenImageFamily"),
}


def family_class(pipeline_class: str) -> Any:
    """The class that serves a diffusers pipeline class. Raises KeyError for one that is not in the table."""
    _, module, name = FAMILIES[pipeline_class]
    return getattr(importlib.import_module(module), name)
