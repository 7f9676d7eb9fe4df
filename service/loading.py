"""Loads models as the settings say. What computes is imported here where it is needed: the API side never loads it."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.settings import Settings

if TYPE_CHECKING:
    from models.engine import Engine


def load_models(settings: Settings, directories: Sequence[Path] = ()) -> "Engine":
    """An engine with the models in `directories`, by default those of the settings. Raises as `models.zoo` does."""
    from models.zoo import load_engine

    return load_engine(directories or settings.model_directories, **_options(settings))


def load_model(settings: Settings, directory: Path) -> "Callable[[Engine], None]":
    """Load one more model. The function that is returned adds it to an engine, see `models.zoo.load_model`."""
    from models.zoo import load_model

    return load_model(directory, **_options(settings))


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "device": settings.device,
        "router_weights": settings.router_weights,
        "background_remover": settings.background_remover,
        "options": settings.load_options,
    }
