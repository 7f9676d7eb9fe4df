"""Conversion of a public `.ckpt`, a pickle of three state dicts, to safetensors in the layout of Hunyuan3D-2."""

import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from models.errors import WeightsError
from models.families.hunyuan3d.checkpoint import build_modules, schedule_of
from models.families.hunyuan3d.layout import CONFIG, find_config, pickle_file, read_config
from models.loading import TensorHead
from models.weights import sha256

_PARTS = ("model", "vae", "conditioner")
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_LICENSE = (
    "Tencent Hunyuan 3D Community License: not for the European Union, the United Kingdom and South Korea; a separate "
    "licence above one million monthly users; outputs may not be used to improve other AI models; distilled and "
    "fine-tuned models, and by its wording possibly routers trained from these weights, are model derivatives under it"
)


def convert_hunyuan3d(source: Path, base: None, out: Path, routers: Path, max_shard_bytes: int) -> None:
    """Fill `out` with `config.yaml` and `model[.fp16].safetensors`, and `routers` with a manifest that has the terms.

    `source` is the `.ckpt` with its `config.yaml` beside it, or their folder, or a folder of one such folder. Tensors
    keep their type. They are read from the mapped file one by one, so that only the current one is in memory. The
    weights stay one file, as published, whatever `max_shard_bytes` is. Raises WeightsError, before anything is written,
    if the tensors are not those that the configuration asks for.
    """
    config_path, file = _find(source)
    config = read_config(config_path)
    tensors = _tensors(file)
    heads = {name: TensorHead(list(tensor.shape), file, _TYPES[tensor.dtype]) for name, tensor in tensors.items()}
    build_modules(config, config_path, heads, file)
    is_consistency_model = schedule_of(config, config_path)[1]
    weights = out / f"{file.stem}.safetensors"
    _write(tensors, weights, str(source))
    shutil.copyfile(config_path, out / CONFIG)
    content = {
        "source": "https://huggingface.co/tencent",
        "license": _LICENSE,
        # Those of the published pipelines.
        "defaults": {
            "num_inference_steps": 5 if is_consistency_model else 50,
            "guidance_scale": 5.0,
            "octree_resolution": 384,
        },
        "imported_from": file.name,
        "sha256": {weights.name: sha256(weights)},
    }
    (routers / "manifest.json").write_text(json.dumps(content, indent=1) + "\n")


def _find(source: Path) -> tuple[Path, Path]:
    """The configuration and the pickle."""
    config = find_config(source if source.is_dir() else source.parent)
    if config is None:
        raise WeightsError(f"{source} has no {CONFIG} beside it; a checkpoint's folder has both")
    return config, pickle_file(config.parent) if source.is_dir() else source


def _tensors(file: Path) -> dict[str, Tensor]:
    """Mapped from the file, under the flat names of the safetensors layout."""
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (EOFError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{file} can't be read as a pickle of tensors alone: {error}") from error
    if not isinstance(content, Mapping) or set(content) != set(_PARTS):
        found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise WeightsError(f"{file} must have the parts {', '.join(_PARTS)}; it has: {found[:200]}")
    tensors: dict[str, Tensor] = {}
    for part in _PARTS:
        for name, tensor in content[part].items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in _TYPES:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise WeightsError(f"{part}.{name} in {file} is of type {kind}; known: {', '.join(map(str, _TYPES))}")
            tensors[f"{part}.{name}"] = tensor
    return tensors


def _write(tensors: Mapping[str, Tensor], path: Path, description: str) -> None:
    """Write safetensors one by one, with a bar over bytes.

    The format's own writer shows no progress and refuses tensors that share memory, as those of fused projections do.
    https://github.com/huggingface/safetensors#format
    """
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        head[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with (
        path.open("wb") as file,
        tqdm(total=end, desc=description, unit="B", unit_scale=True, disable=None) as bar,
    ):
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            _write_tensor(tensor, file)
            bar.update(tensor.nbytes)


def _write_tensor(tensor: Tensor, file: BinaryIO) -> None:
    """Writes little-endian bytes: all machines that torch runs on are little-endian."""
    file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
