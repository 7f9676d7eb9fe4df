"""What a diffusers pipeline's directory holds: its parts' classes, its weight files, its terms."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant

from models.errors import WeightsError
from models.weights import read_json

_NETWORKS = ("scheduler", "transformer", "vae", "text_encoder", "text_encoder_2")
"""Parts that must be of the classes that the pipeline names. Tokenizers are published under several names."""

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)"
    r"(?:\.safetensors\.index(?:\.(?P<of_index>[\w-]+))?\.json|(?:\.(?P<of_file>[a-zA-Z0-9_]+))?\.safetensors)"
)


def networks(pipeline_class: type[DiffusionPipeline], directory: Path) -> dict[str, type[Any]]:
    """The classes of the pipeline's parts that compute, by the parts' names.

    Raises WeightsError, naming the part, if one is of another class than `pipeline_class` takes, or quantised.
    """
    index_file = directory / "model_index.json"
    index, classes = read_json(index_file), {}
    for name, (cls, *_) in pipeline_class._get_signature_types().items():
        if name in _NETWORKS:
            entry = index.get(name)
            found = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else str(entry)
            if found != cls.__name__:
                raise WeightsError(f"{index_file} names {found} as its {name}; served is {cls.__name__}")
            _check_unquantised(directory / name / "config.json")
            classes[name] = cls
    return classes


def _check_unquantised(config_file: Path) -> None:
    config = read_json(config_file) if config_file.exists() else {}
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method") if isinstance(quantisation, Mapping) else None
        raise WeightsError(
            f"{config_file} is of quantised weights (quantization_config, quant_method {method}), which can't be "
            "served; use weights that are not quantised"
        )


def variant_of(folders: Sequence[Path]) -> str | None:
    """The variant, such as `fp16`, of the weights in those `folders` that have no plain ones; None if all have.

    Raises WeightsError if there are several variants to choose from.
    """
    found = [variants for variants in map(_variants, folders) if variants and "" not in variants]
    common = set.intersection(*found) if found else set()
    if found and len(common) != 1:
        names = ", ".join(sorted(set.union(*found)))
        raise WeightsError(f"{folders[0].parent} has weights of several variants: {names}; remove all but one")
    return common.pop() if common else None


def _variants(folder: Path) -> set[str]:
    """The variants of a folder's weights; the empty one for plain files."""
    matches = [_WEIGHTS.fullmatch(file.name) for file in folder.glob("*")]
    return {match["of_index"] or match["of_file"] or "" for match in matches if match}


def weight_files(folder: Path) -> list[Path]:
    """The files of a diffusers model's weights. Raises WeightsError, naming them, if some are absent."""
    variant = variant_of([folder])
    index = folder / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    names = {_add_variant(SAFETENSORS_WEIGHTS_NAME, variant)}
    if index.exists():
        try:
            names = set(read_json(index)["weight_map"].values())
        except (KeyError, AttributeError) as error:
            raise WeightsError(f"{index} has no proper entry 'weight_map'") from error
    if absent := sorted(name for name in names if not (folder / name).exists()):
        pickles = ", ".join(path.name for path in folder.glob("*.bin"))
        raise WeightsError(
            f"{folder} has no {some(absent)}"
            + (f"; {pickles} is not read, since a pickle can run any code: save it as safetensors" if pickles else "")
        )
    return [folder / name for name in sorted(names)]


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
