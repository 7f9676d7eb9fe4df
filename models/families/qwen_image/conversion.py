"""Imports Elastic-DiT's checkpoint for Qwen-Image, which holds a backbone and its routers as one set of tensors.

The backbone has diffusers' names and shapes. The routers are `gate_mlps.<block>.*`; the official program computes a
third of their modulation and throws it away (Elastic-DiT at ce39f1d, `diffsynth/models/qwen_image_dit.py`).
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.utils.constants import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from models.elastic.router import RouterStack
from models.errors import WeightsError
from models.loading import TensorHead, misfit, read_heads
from models.rules import policy_entry
from models.rules.router import OFFICIAL, PAPER
from models.weights import ROUTER_FILE, MlpActivation, read_json, sha256, write_manifest

_ROUTERS = "gate_mlps."
_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_MANIFEST = {
    "source": "https://huggingface.co/wjs0725/Elastic-DiT",
    "license": "unknown",  # neither the checkpoint's repository nor the program's says
    # Those of the official program's infer.py.
    "defaults": {"num_inference_steps": 30, "guidance_scale": 4.0, "height": 1328, "width": 1328},
    "traits": {"mlp_activation": MlpActivation.GELU_SIGMOID, "rescales_guidance": False},
    "published_policies": [policy_entry(OFFICIAL), policy_entry(PAPER)],
}


def convert_elastic_dit(source: Path, base: Path, out: Path, routers: Path, max_shard_bytes: int) -> None:
    """Fill `out` with a Qwen-Image pipeline directory and `routers` with its router folder.

    `source` is a safetensors file, an index of shards, or a folder with one of them. `base` is an ordinary Qwen-Image
    directory, which gives everything but the transformer's weights. Tensors keep their type. They stay mapped from the
    source's files while they are written, so no file has to fit in memory. Raises WeightsError, before anything is
    written, if names, shapes or types are not those of the base's transformer and its routers.
    """
    parts = _parts(base)
    config = read_json(base / "transformer" / "config.json")
    heads = _read_heads(source)
    expected = _expected_shapes(config, heads)
    if fault := misfit(expected, heads):
        raise WeightsError(f"{source} is not an Elastic-DiT checkpoint of the base's transformer: {fault}")
    size_bytes = sum(_size_bytes(head) for head in heads.values())
    with tqdm(total=size_bytes, desc=str(source), unit="B", unit_scale=True, disable=None) as bar:
        try:
            backbone = [name for name in expected if not name.startswith(_ROUTERS)]
            weights = _write_shards(out / "transformer", _shards(backbone, heads, max_shard_bytes), heads, bar)
            names = [name for name in expected if name.startswith(_ROUTERS)]
            save_file(router_tensors(_read(names, heads)), routers / ROUTER_FILE)
            bar.update(sum(_size_bytes(heads[name]) for name in names))
        except SafetensorError as error:
            raise WeightsError(f"{source} can't be converted: {error}") from error
    _take_over(base, out, [*parts, "transformer/config.json", "model_index.json"])
    # An index holds its shards' hashes, so hashing the index, which is quick, identifies the backbone.
    write_manifest(
        routers, out, f"transformer/{weights}", _MANIFEST | {"imported_from": source.name, "base": base.name}
    )


def router_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The routers' tensors of an official state dict, without the third of the modulation that has no effect."""
    return {
        name: tensor[: len(tensor) // 3 * 2] if ".img_mod." in name else tensor
        for name, tensor in tensors.items()
        if name.startswith(_ROUTERS)
    }


def _parts(base: Path) -> list[str]:
    """The folders of a pipeline directory, without the transformer's."""
    index = read_json(base / "model_index.json")
    if index.get("_class_name") != "QwenImagePipeline":
        raise WeightsError(f"{base} is a {index.get('_class_name')}; Elastic-DiT's checkpoint fits a QwenImagePipeline")
    parts = [name for name, part in index.items() if isinstance(part, list) and part[0] and name != "transformer"]
    if absent := [name for name in parts if not (base / name).is_dir()]:
        raise WeightsError(f"{base} has no {', '.join(absent)}")
    return parts


def _read_heads(source: Path) -> dict[str, TensorHead]:
    heads: dict[str, TensorHead] = {}
    for file in _files(source):
        try:
            found = read_heads([file])
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{file} can't be read: {error}") from error
        for name, head in found.items():
            if head.dtype not in _BYTES:
                raise WeightsError(f"{name} in {file} is of type {head.dtype}; known: {', '.join(_BYTES)}")
            if name in heads:
                raise WeightsError(f"{name} is in {heads[name].file} and in {file}")
        heads |= found
    return heads


def _size_bytes(head: TensorHead) -> int:
    return torch.Size(head.shape).numel() * _BYTES[head.dtype]


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        indices = sorted(source.glob("*.safetensors.index.json"))
        if not indices:
            return sorted(source.glob("*.safetensors"))
        source = indices[0]
    if source.suffix != ".json":
        return [source]
    try:
        return [source.parent / name for name in sorted(set(read_json(source)["weight_map"].values()))]
    except (KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{source} has no proper entry 'weight_map'") from error


def _expected_shapes(config: Mapping[str, object], heads: Mapping[str, TensorHead]) -> dict[str, list[int]]:
    """All tensors of an official checkpoint, the backbone's first."""
    trunk = heads.get(f"{_ROUTERS}0.out.0.weight")
    hidden = trunk.shape[0] if trunk and trunk.shape else 128
    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel.from_config(config)
        routers = RouterStack(len(transformer.transformer_blocks), transformer.inner_dim, hidden)
    state = transformer.state_dict() | routers.state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    for name in routers.state_dict():
        if ".img_mod." in name:
            shapes[name][0] = shapes[name][0] // 2 * 3
    return shapes


def _shards(names: Iterable[str], heads: Mapping[str, TensorHead], max_shard_bytes: int) -> list[list[str]]:
    """Splits names, in order, into files of at most `max_shard_bytes`, or of one tensor."""
    shards: list[list[str]] = [[]]
    size_bytes = 0
    for name in names:
        size_bytes += _size_bytes(heads[name])
        if shards[-1] and size_bytes > max_shard_bytes:
            shards.append([])
            size_bytes = _size_bytes(heads[name])
        shards[-1].append(name)
    return shards


def _write_shards(folder: Path, shards: Sequence[Sequence[str]], heads: Mapping[str, TensorHead], bar: tqdm) -> str:
    """Write a model's weights as diffusers does. Returns the name of the only file, or of the index of several."""
    folder.mkdir()
    if len(shards) == 1:
        files = [SAFETENSORS_WEIGHTS_NAME]
    else:
        stem, suffix = os.path.splitext(SAFETENSORS_WEIGHTS_NAME)
        files = [f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}" for number in range(1, len(shards) + 1)]
    digests = {}
    for file, names in zip(files, shards, strict=True):
        save_file(_read(names, heads), folder / file, metadata={"format": "pt"})
        digests[file] = sha256(folder / file)
        bar.update(sum(_size_bytes(heads[name]) for name in names))
    if len(files) == 1:
        return files[0]
    index = {
        "metadata": {
            "total_size": sum(_size_bytes(heads[name]) for names in shards for name in names),
            "sha256": digests,
        },
        "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
    }
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n")
    return str(SAFE_WEIGHTS_INDEX_NAME)


def _read(names: Sequence[str], heads: Mapping[str, TensorHead]) -> dict[str, Tensor]:
    """Tensors mapped from their files, not copied."""
    tensors: dict[str, Tensor] = {}
    for file in sorted({heads[name].file for name in names}):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in names if heads[name].file == file}
    return tensors


def _take_over(base: Path, out: Path, parts: Sequence[str]) -> None:
    """Link files and folders of `base` into `out`, or copy them where the file system can't link."""
    for part in parts:
        for file in [base / part] if (base / part).is_file() else sorted((base / part).rglob("*")):
            if file.is_file():
                target = out / file.relative_to(base)
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(file.resolve(), target)
                except OSError:
                    shutil.copyfile(file, target)
