"""The layout of published Hunyuan3D checkpoints: folders, file names, the classes that `config.yaml` names."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from models.errors import WeightsError
from models.families.entry import NamedClass
from models.families.hunyuan3d import ENTRY

CONFIG = "config.yaml"

_WEIGHTS = ("model.safetensors", "model.fp16.safetensors")
_PICKLES = ("model.ckpt", "model.fp16.ckpt")


class Part(NamedTuple):
    """A class, by the last part of its dotted name, and its arguments."""

    class_name: str
    params: Mapping[str, Any]


def find_config(directory: Path) -> Path | None:
    """The denoiser's `config.yaml`: in `directory`, or in one of its folders, as in a published repository.

    A repository also has folders of autoencoders and painters. Raises WeightsError if it has several denoisers.
    """
    if (directory / CONFIG).exists():
        return directory / CONFIG
    configs = [path for path in sorted(directory.glob(f"*/{CONFIG}")) if _is_of_denoiser(path)]
    if len(configs) > 1:
        names = ", ".join(path.parent.name for path in configs)
        raise WeightsError(f"{directory} has several models: {names}; name the folder of one")
    return configs[0] if configs else None


def denoiser_class(directory: Path) -> NamedClass | None:
    """The denoiser's class; None if the directory has no `config.yaml`. Raises WeightsError as `find_config` does."""
    config = find_config(directory)
    return NamedClass(config, part_of(read_config(config), "model", config).class_name) if config else None


def read_config(path: Path) -> Mapping[str, Any]:
    """Raises WeightsError if it can't be read."""
    try:
        content = yaml.load(path.read_text(), _Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise WeightsError(f"{path} can't be read: {error}") from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} is not a mapping of parts to their classes")
    return content


def part_of(config: Mapping[str, Any], name: str, path: Path) -> Part:
    """The part of this name of the configuration read from `path`. Raises WeightsError if it is malformed."""
    try:
        entry = config[name]
        return Part(str(entry["target"]).rpartition(".")[2], dict(entry.get("params") or {}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} has no proper entry '{name}' with a target: {error!r}") from error


def weight_file(folder: Path) -> Path:
    """The weights beside a `config.yaml`; of two files, the one that is not rounded.

    Raises WeightsError if there are none.
    """
    for name in _WEIGHTS:
        if (folder / name).exists():
            return folder / name
    if pickle := next((folder / name for name in _PICKLES if (folder / name).exists()), None):
        raise WeightsError(
            f"{pickle} is not read, since a pickle can run any code: convert it once, by "
            f"elastic-dit convert --format hunyuan3d --src {pickle} --out <model directory>"
        )
    raise WeightsError(f"{folder} has no {' or '.join(_WEIGHTS)}")


def pickle_file(folder: Path) -> Path:
    """The pickled weights beside a `config.yaml`. Raises WeightsError if there are none."""
    for name in _PICKLES:
        if (folder / name).exists():
            return folder / name
    raise WeightsError(f"{folder} has no {' or '.join(_PICKLES)}")


def _is_of_denoiser(path: Path) -> bool:
    model = read_config(path).get("model")
    return isinstance(model, Mapping) and str(model.get("target")).rpartition(".")[2] in ENTRY.class_names


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # see above
    """Reads `1e-6` as a number, as YAML 1.2 does. PyYAML alone reads a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
