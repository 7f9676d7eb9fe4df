"""Loads model directories straight onto the device, with at most one tensor at a time on the host.

diffusers' own `from_pretrained(device_map=...)` reads whole shards. For a missing tensor it reports only a failed copy
from the meta device, without naming the file or other missing tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open
from torch import nn
from tqdm import tqdm

from models.device import encoder_dtype
from models.diffusers_directory import networks, some, variant_of, weight_files
from models.errors import WeightsError
from models.families.entry import NamedClass
from models.float8 import Float8Linear, store_in_float8
from models.load_options import LoadOptions
from models.lora import fuse_loras
from models.weights import read_json

# diffusers checks little of a configuration, and fails anywhere on a malformed one.
_MALFORMED = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, SafetensorError)


def pipeline_class(directory: Path) -> NamedClass | None:
    """The class of a diffusers pipeline's directory; None if it has no `model_index.json`. Raises WeightsError if that
    can't be read.
    """
    index = directory / "model_index.json"
    return NamedClass(index, str(read_json(index).get("_class_name"))) if index.exists() else None


def stream_pipeline(
    pipeline_class: type[DiffusionPipeline],
    directory: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    options: LoadOptions,
    loaders: Mapping[str, Callable[[Path], Any]] = MappingProxyType({}),
    unused: Sequence[str] = (),
) -> DiffusionPipeline:
    """The result of `pipeline_class.from_pretrained(directory, dtype=dtype).to(device)`, with little host memory.

    `directory` may end in names of adapters (`LoadOptions.source`), which are fused into the weights.

    Text encoders are loaded to the host first, and stay there if `options` say so, in `encoder_dtype`: prompts must
    then be encoded on the encoder's device and the result moved. `loaders` are functions that load other parts from
    their folders, by name. `unused` are modules whose results nobody reads, such as `text_encoder.lm_head`: they give
    way to ones without weights. Raises WeightsError if parts are missing or do not fit together.
    """
    directory, loras = options.source(directory)
    classes = networks(pipeline_class, directory)
    casts_later = options.has_float8 and bool(loras)  # adapters are added to full weights
    modules: dict[str, Any] = {
        "transformer": stream_module(
            classes["transformer"],
            directory / "transformer",
            "cpu" if options.offloads_layers or casts_later else device,
            dtype,
            in_float8=options.has_float8 and not casts_later,
        ),
        "vae": stream_module(classes["vae"], directory / "vae", device, dtype),
    }
    encoders = [directory / name for name in classes if name.startswith("text_encoder")]
    try:
        modules |= {name: load(directory / name) for name, load in loaders.items()}
        pipeline = pipeline_class.from_pretrained(
            directory,
            dtype=dtype,
            variant=variant_of(encoders),
            local_files_only=True,
            use_safetensors=True,
            **modules,
        )
    except _MALFORMED as error:
        raise WeightsError(f"{directory} can't be loaded: {error}") from error
    for name in unused:
        part, _, module = name.partition(".")
        pipeline.components[part].set_submodule(module, nn.Identity())
    if options.offloads_text_encoders:
        for encoder in encoders:
            pipeline.components[encoder.name].to(encoder_dtype(dtype))
    if loras:
        fuse_loras(pipeline, loras)
    if options.has_float8:
        for part in (modules["transformer"], *(pipeline.components[encoder.name] for encoder in encoders)):
            store_in_float8(part)
    if not options.offloads_layers:  # else `Family.keep_blocks_on_host` moves what is not of blocks
        modules["transformer"].to(device)
    return pipeline if options.offloads_text_encoders else pipeline.to(device)


class TensorHead(NamedTuple):
    """What is known about a tensor before it is read. `dtype` is safetensors' name of its type, such as `BF16`."""

    shape: list[int]
    file: Path
    dtype: str


def stream_module(
    cls: type[ModelMixin],
    directory: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    *,
    in_float8: bool = False,
) -> nn.Module:
    """The result of `cls.from_pretrained(directory, dtype=dtype)`, on `device`.

    With `in_float8` it stores the weights of its blocks so (`store_in_float8`).
    Shows a progress bar on terminals. Raises WeightsError if the tensors are not exactly those of the configuration.
    """
    files = weight_files(directory)
    try:
        module = _build_empty(cls, directory, dtype)
        if fault := misfit(shapes_of(module), read_heads(files)):
            raise WeightsError(f"{directory} does not fit its config.json: {fault}")
        if in_float8:
            store_in_float8(module)
        kept = cls._keep_in_fp32_modules or []

        def place(name: str) -> tuple[str | torch.device, torch.dtype]:
            return device, torch.float32 if any(part in kept for part in name.split(".")) else dtype

        stream_tensors(module, files, place, str(directory))
    except _MALFORMED as error:
        raise WeightsError(f"{directory} can't be loaded: {error}") from error
    # Moves buffers that are not saved, which were computed on the host.
    return module.to(device).eval()


def stream_tensors(
    module: nn.Module,
    files: Sequence[Path],
    place: Callable[[str], tuple[str | torch.device, torch.dtype]],
    description: str,
    *,
    copies: bool = False,
) -> None:
    """Read the tensors of `files` one by one into `module`. `place` gives the device and type for each name.

    Integers keep their type, and the weights that are stored in float8 are cast on the host. On a CPU, tensors that
    keep their type stay mapped from their file, unless `copies` is true. In files tensors are aligned to 8 bytes only,
    and kernels then sum in another order than with the memory of `load_state_dict`. Shows a progress bar on terminals.
    """
    size_bytes = sum(file.stat().st_size for file in files)
    with tqdm(total=size_bytes, desc=description, unit="B", unit_scale=True, disable=None) as bar:
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                    tensor = tensors.get_tensor(name)
                    if copies:
                        tensor = tensor.clone()
                    device, dtype = place(name)
                    owner, _, kind = name.rpartition(".")
                    layer = module.get_submodule(owner)
                    if isinstance(layer, Float8Linear) and kind == "weight":
                        layer.store(tensor, device)
                    else:
                        set_module_tensor_to_device(module, name, device, tensor, dtype, clear_cache=False)
                    bar.update(tensor.nbytes)


def read_heads(files: Sequence[Path]) -> dict[str, TensorHead]:
    """The heads of all tensors, by name."""
    heads = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                tensor = tensors.get_slice(name)
                heads[name] = TensorHead(tensor.get_shape(), file, tensor.get_dtype())
    return heads


def shapes_of(module: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def misfit(expected: Mapping[str, list[int]], found: Mapping[str, TensorHead]) -> str:
    """How names and shapes differ from those expected. Empty if they do not."""
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "surplus": [f"{name} in {head.file.name}" for name, head in found.items() if name not in expected],
        "misshapen": [
            f"{name} in {head.file.name}, {head.shape} for {expected[name]}"
            for name, head in found.items()
            if name in expected and head.shape != expected[name]
        ],
    }
    return "; ".join(f"{fault}: {some(names)}" for fault, names in faults.items() if names)


def _build_empty(cls: type[ModelMixin], directory: Path, dtype: torch.dtype) -> nn.Module:
    """The module with its parameters on the meta device. Buffers that it computes itself are real, on the host."""
    config = cls.load_config(directory, local_files_only=True)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # as from_pretrained does, for buffers that are not saved
    try:
        with init_empty_weights(include_buffers=False):
            module: nn.Module = cls.from_config(config)
    finally:
        torch.set_default_dtype(default)
    return module
