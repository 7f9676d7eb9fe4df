"""The order of MLPs' hidden neurons in a checkpoint. Narrow MLPs keep the first ones, so the most important come first.

Files are written in this order, rather than models put into it when they are loaded. At full width another order of a
sum rounds otherwise, so only then do exact results equal those of other programs that read the same file.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.errors import InvalidRequest, WeightsError
from models.families.wrapping import Mlp, mlp_name
from models.load_options import DEFAULTS
from models.weights import (
    ROUTER_FILE,
    neuron_orders_in,
    read_json,
    read_manifest,
    router_tensors_in,
    sha256,
    write_manifest,
)
from models.zoo import family_of


class Reordering(NamedTuple):
    """Puts the entries of a tensor from `first` on, along `dim`, into `order` `(entries,)` of old positions."""

    dim: int
    first: int
    order: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        index = torch.arange(tensor.shape[self.dim])
        index[self.first : self.first + len(self.order)] = self.first + self.order.long()
        return tensor.index_select(self.dim, index)


def mlps_by_name(blocks: Mapping[str, nn.Module], mlps: Callable[[nn.Module], Mapping[str, Mlp]]) -> Mapping[str, Mlp]:
    """The MLPs that may be narrowed, by the names that orders have."""
    return {mlp_name(block, part): mlp for block, module in blocks.items() for part, mlp in mlps(module).items()}


def reorderings(transformer: nn.Module, mlps: Mapping[str, Mlp], orders: Mapping[str, Tensor]) -> dict[str, Reordering]:
    """What changes, by the names of the transformer's tensors.

    `orders` has for names of `mlps` the old positions of their hidden neurons, the most important first. Raises
    WeightsError if an order does not fit.
    """
    names = {id(module): name for name, module in transformer.named_modules()}
    changes = {}
    for name, order in orders.items():
        if name not in mlps:
            raise WeightsError(f"neuron_order.{name} names no MLP of the model; there are: {', '.join(mlps)}")
        mlp = mlps[name]
        if sorted(order.tolist()) != list(range(mlp.num_hidden)):
            raise WeightsError(
                f"neuron_order.{name} is not a permutation of the block's {mlp.num_hidden} hidden neurons"
            )
        first, last = names[id(mlp.first)], names[id(mlp.last)]
        changes[f"{first}.weight"] = Reordering(0, mlp.row, order)
        if mlp.first.bias is not None:
            changes[f"{first}.bias"] = Reordering(0, mlp.row, order)
        changes[f"{last}.weight"] = Reordering(1, mlp.column, order)
    return changes


def write_reordered(files: Mapping[Path, Path], changes: Mapping[str, Reordering]) -> None:
    """Write each safetensors file, a key of `files`, to the new file beside it, with `changes` applied.

    In files of whole models the names of tensors begin with the part's name. Raises WeightsError if a tensor is in
    none of the files.
    """
    left = set(changes)
    for source, target in files.items():
        with safe_open(source, framework="pt") as opened:
            metadata, names = opened.metadata(), list(opened.keys())
            tensors = {name: opened.get_tensor(name) for name in names}
        for name in names:
            found = {name, name.partition(".")[2]} & left
            for change in found:
                tensors[name] = changes[change].of(tensors[name])
            left -= found
        save_file(tensors, target, metadata=metadata)
    if left:
        raise WeightsError(f"{', '.join(map(str, files))} lack {', '.join(sorted(left)[:4])}")


def reorder(source: Path, base: None, out: Path, routers: Path, max_shard_bytes: int, *, source_routers: Path) -> None:
    """Fill `out` with the model directory `source`, its neurons in the order that its router folder asks for.

    Fills `routers` with that folder, `source_routers`, which asks for none then. Files stay split as they are, whatever
    `max_shard_bytes` is. Raises InvalidRequest if it asks for none already, and WeightsError if it does not fit.
    """
    if not (source_routers / ROUTER_FILE).exists():
        raise InvalidRequest(f"{source} has no routers in {source_routers}, so there is no order to put it into", "src")
    tensors = router_tensors_in(source_routers, source)
    orders = neuron_orders_in(tensors)
    if not orders:
        raise InvalidRequest(f"the neurons of {source} are in order already", "src")
    entry, _ = family_of(source)
    family = entry.family.load().load(
        source, "cpu", torch.bfloat16, None, read_manifest(source_routers).traits, DEFAULTS
    )
    transformer, adapter = family.transformer, family.adapter
    changes = reorderings(transformer, mlps_by_name(adapter.blocks(transformer), adapter.mlps), orders)
    manifest = read_json(source_routers / "manifest.json")
    (transformer_file,) = manifest["sha256"].keys() - {ROUTER_FILE}
    files = _files(source / transformer_file)
    written = [file.relative_to(source) for file in files]
    _copy(source, out, written)
    write_reordered({file: out / name for file, name in zip(files, written, strict=True)}, changes)
    if transformer_file.endswith(".json"):
        _renew_index(out / transformer_file, [out / name for name in written])
    _copy(source_routers, routers, [Path(ROUTER_FILE), Path("manifest.json")])
    save_file({name: tensors[name] for name in tensors if name.startswith("gate_mlps.")}, routers / ROUTER_FILE)
    write_manifest(routers, out, transformer_file, manifest)


def _files(transformer_file: Path) -> list[Path]:
    """The safetensors files of a transformer: the only one, or those that an index names."""
    if transformer_file.suffix != ".json":
        return [transformer_file]
    return [transformer_file.parent / name for name in sorted(set(read_json(transformer_file)["weight_map"].values()))]


def _renew_index(index: Path, files: Iterable[Path]) -> None:
    content = read_json(index)
    content.setdefault("metadata", {})["sha256"] = {file.name: sha256(file) for file in files}
    index.unlink()  # it may be a link to the source's
    index.write_text(json.dumps(content, indent=1) + "\n")


def _copy(source: Path, target: Path, left_out: Iterable[Path]) -> None:
    skipped = {source / name for name in left_out}

    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) / name in skipped]

    shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignored)
