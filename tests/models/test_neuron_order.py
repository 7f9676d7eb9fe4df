"""Files whose routers ask for another order of the neurons are written anew; what computes never moves a neuron."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.conversion import convert
from models.engine import Engine
from models.errors import InvalidRequest, WeightsError
from models.families.wrapping import Mlp
from models.neuron_order import mlps_by_name, reorderings
from models.request import GenerationRequest
from models.state import DenoiseState
from models.weights import sha256
from models.zoo import load_engine
from tests.fixtures.tiny_routers import save_routers

Ask = Callable[..., GenerationRequest]
Denoise = Callable[..., DenoiseState]


@pytest.fixture(scope="session", params=["flux", "qwen_image", "hunyuan3d_plain", "hunyuan3d_stream"])
def kind(kind: Any) -> Any:
    """One of each layout and each form of block."""
    return kind


@pytest.fixture
def mlps(kind: Any, stock: Any) -> Mapping[str, Mlp]:
    return mlps_by_name(kind.adapter.blocks(stock.transformer), kind.adapter.mlps)


@pytest.fixture
def orders(mlps: Mapping[str, Mlp]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return {name: torch.randperm(mlp.num_hidden, generator=rng).int() for name, mlp in mlps.items()}


def renew_hash(folder: Path, name: str, file: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = sha256(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def add_orders(folder: Path, orders: Mapping[str, Tensor]) -> None:
    """As earlier versions of training wrote them."""
    path = folder / "router.safetensors"
    save_file(load_file(path) | {f"neuron_order.{name}": order for name, order in orders.items()}, path)
    renew_hash(folder, path.name, path)


@pytest.fixture
def old_routers(kind: Any, directory: Path, orders: Mapping[str, Tensor], tmp_path: Path) -> Path:
    """A folder of router folders; that of the model asks for another order."""
    save_routers(tmp_path / "routers" / kind.model, kind, directory)
    add_orders(tmp_path / "routers" / kind.model, orders)
    return tmp_path / "routers"


def reordered(directory: Path, routers: Path) -> Path:
    out = routers.parent / "in-order"
    convert("reorder", directory, None, out, router_weights=routers, max_shard_bytes=1)
    return out


def test_order_that_the_file_does_not_have_is_refused_with_the_command_that_mends_it(
    directory: Path, old_routers: Path
) -> None:
    command = f"elastic-dit convert --format reorder --src {directory} --out {directory}-in-order"
    with pytest.raises(WeightsError, match=command):
        load_engine([directory], device="cpu", router_weights=old_routers)


def test_reordered_model_is_exact_and_differs_from_the_old_one_by_rounding_alone(
    kind: Any,
    directory: Path,
    old_routers: Path,
    engine: Engine,
    mlps: Mapping[str, Mlp],
    orders: Mapping[str, Tensor],
    stock_result: Callable[..., Any],
    ask: Ask,
    denoise: Denoise,
) -> None:
    out = reordered(directory, old_routers)
    found, request = load_engine([out], device="cpu", router_weights=old_routers), ask()
    # Bit for bit what the stock pipeline makes of the new directory
    stock = kind.load_stock(out)
    latents = denoise(found, replace(request, model=out.name)).latents
    assert torch.equal(latents, stock_result(stock, request, engine))
    # The old results up to rounding
    old = denoise(engine, request).latents
    torch.testing.assert_close(latents, old, rtol=0, atol=1e-5)
    assert not torch.equal(latents, old)
    # And the first neurons are those that the order names first
    ordered = mlps_by_name(kind.adapter.blocks(stock.transformer), kind.adapter.mlps)
    for name, order in orders.items():
        (first, last, row, column), (new_first, new_last, *_) = mlps[name], ordered[name]
        assert torch.equal(new_first.weight[row:], first.weight[row:][order.long()])
        assert torch.equal(new_first.weight[:row], first.weight[:row])
        assert torch.equal(new_last.weight[:, column:], last.weight[:, column:][:, order.long()])
        assert torch.equal(new_last.weight[:, :column], last.weight[:, :column])


def test_model_in_order_is_not_written_again(directory: Path, old_routers: Path) -> None:
    out = reordered(directory, old_routers)
    with pytest.raises(InvalidRequest, match="in-order are in order already"):
        convert("reorder", out, None, out / "again", router_weights=old_routers, max_shard_bytes=1)
    with pytest.raises(InvalidRequest, match="has no routers"):
        convert("reorder", directory, None, out / "again", router_weights=out, max_shard_bytes=1)


@pytest.mark.parametrize("kind", ["flux"], indirect=True, scope="session")
def test_transformer_of_several_files_stays_split(
    kind: Any, directory: Path, old_routers: Path, stock: Any, tmp_path: Path
) -> None:
    split = tmp_path / "split"
    stock.save_pretrained(split)
    (split / kind.transformer_file).unlink()
    stock.transformer.save_pretrained(split / "transformer", max_shard_size="100KB")
    (old_routers / kind.model).rename(old_routers / split.name)
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    manifest = json.loads((old_routers / split.name / "manifest.json").read_text())
    del manifest["sha256"][kind.transformer_file]
    (old_routers / split.name / "manifest.json").write_text(json.dumps(manifest))
    renew_hash(old_routers / split.name, index, split / index)
    out = reordered(split, old_routers)
    load_engine([out], device="cpu", router_weights=old_routers)
    names = sorted(path.name for path in (out / "transformer").iterdir())
    assert names == sorted(path.name for path in (split / "transformer").iterdir())
    assert len(names) > 3
    digests = json.loads((out / index).read_text())["metadata"]["sha256"]
    assert digests == {name: sha256(out / "transformer" / name) for name in digests}
    assert len(digests) == len(names) - 2


def test_order_that_is_no_permutation_is_refused(stock: Any, mlps: Mapping[str, Mlp]) -> None:
    name, mlp = next(iter(mlps.items()))
    for order in (torch.arange(mlp.num_hidden - 1), torch.zeros(mlp.num_hidden, dtype=torch.int32)):
        message = f"neuron_order.{name} is not a permutation of the block's {mlp.num_hidden} hidden neurons"
        with pytest.raises(WeightsError, match=message):
            reorderings(stock.transformer, mlps, {name: order})


def test_order_of_an_unknown_mlp_is_refused_with_the_known_names(stock: Any, mlps: Mapping[str, Mlp]) -> None:
    known = next(iter(mlps))
    with pytest.raises(WeightsError, match=f"neuron_order.block.99 names no MLP of the model; there are: {known}, "):
        reorderings(stock.transformer, mlps, {"block.99": torch.arange(4)})
