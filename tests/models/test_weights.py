import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.card import EXACT, CurvePoint, Policy
from models.elastic.router import RouterStack
from models.engine import load_engine
from models.errors import WeightsError
from models.request import Preset
from models.weights import (
    Manifest,
    RouterWeights,
    load_router_weights,
    read_curve,
    read_manifest,
    save_router_weights,
    sha256,
    write_curve,
)

MODEL = "tiny-flux"


@pytest.fixture
def folder(router_weights: Path, tmp_path: Path) -> Path:
    """A copy of the router folder that a test may spoil."""
    return Path(shutil.copytree(router_weights / MODEL, tmp_path / "routers" / MODEL))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def replace_stack(folder: Path, stack: RouterStack) -> None:
    save_router_weights(RouterWeights(stack, {}), folder)
    edit_manifest(folder, lambda c: c["sha256"].update({"router.safetensors": sha256(folder / "router.safetensors")}))


def test_router_weights_survive_a_round_trip_in_sixteen_bits(tmp_path: Path, tiny_flux: Path) -> None:
    stack = RouterStack(3, 8, hidden=4)
    orders = {"double.00": torch.randperm(32), "single.00": torch.randperm(32)}
    save_router_weights(RouterWeights(stack, orders), tmp_path)
    (tmp_path / "manifest.json").write_text('{"sha256": {}}')
    loaded = load_router_weights(tmp_path, tiny_flux)
    assert loaded is not None
    for name, tensor in loaded.stack.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stack.state_dict()[name].half().float())
    assert {name: order.tolist() for name, order in loaded.neuron_orders.items()} == {
        name: order.tolist() for name, order in orders.items()
    }
    assert not any(parameter.requires_grad for parameter in loaded.stack.parameters())


def test_folder_without_routers_gives_none(tmp_path: Path, tiny_flux: Path) -> None:
    assert load_router_weights(tmp_path, tiny_flux) is None


@pytest.mark.parametrize("name", ["router.safetensors", "transformer/diffusion_pytorch_model.safetensors"])
def test_file_with_another_hash_is_refused_by_name(folder: Path, tiny_flux: Path, name: str) -> None:
    edit_manifest(folder, lambda content: content["sha256"].update({name: "0" * 64}))
    with pytest.raises(WeightsError, match=f"{name}.* sha256 differs"):
        load_router_weights(folder, tiny_flux)


def test_changed_router_file_is_refused(folder: Path, tiny_flux: Path) -> None:
    tensors = load_file(folder / "router.safetensors")
    tensors["gate_mlps.0.out.2.bias"] += 1
    save_file(tensors, folder / "router.safetensors")
    with pytest.raises(WeightsError, match=r"router\.safetensors"):
        load_router_weights(folder, tiny_flux)


def test_file_that_the_model_lacks_is_refused_by_name(folder: Path, tiny_flux: Path) -> None:
    edit_manifest(folder, lambda content: content["sha256"].update({"transformer/other.safetensors": "0" * 64}))
    with pytest.raises(WeightsError, match=r"transformer/other\.safetensors"):
        load_router_weights(folder, tiny_flux)


def test_routers_without_a_manifest_are_refused(folder: Path, tiny_flux: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(WeightsError, match=r"manifest\.json"):
        load_router_weights(folder, tiny_flux)


def test_manifest_without_hashes_is_refused(folder: Path, tiny_flux: Path) -> None:
    edit_manifest(folder, lambda content: content.pop("sha256"))
    with pytest.raises(WeightsError, match=r"manifest\.json"):
        load_router_weights(folder, tiny_flux)


@pytest.mark.parametrize("tensor", ["gate_mlps.0.out.0.weight", "gate_mlps.3.width_head.bias"])
def test_routers_that_lack_a_tensor_are_refused(folder: Path, tiny_flux: Path, tensor: str) -> None:
    tensors = load_file(folder / "router.safetensors")
    del tensors[tensor]
    save_file(tensors, folder / "router.safetensors")
    edit_manifest(folder, lambda c: c["sha256"].update({"router.safetensors": sha256(folder / "router.safetensors")}))
    with pytest.raises(WeightsError, match=r"router\.safetensors"):
        load_router_weights(folder, tiny_flux)


@pytest.mark.parametrize(
    "stack", [RouterStack(5, 32, 16), RouterStack(6, 16, 16)], ids=["one router too few", "too narrow"]
)
def test_routers_of_another_model_are_refused(folder: Path, tiny_flux: Path, stack: RouterStack) -> None:
    replace_stack(folder, stack)
    with pytest.raises(WeightsError, match="router"):
        load_engine([tiny_flux], device="cpu", router_weights=folder.parent)


def test_manifest_tells_terms_and_defaults(folder: Path) -> None:
    assert read_manifest(folder) == Manifest("apache-2.0", 4, 2.5)


def test_folder_without_a_manifest_has_none(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


def test_manifest_without_defaults_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda content: content.pop("defaults"))
    with pytest.raises(WeightsError, match=r"manifest\.json.*defaults"):
        read_manifest(folder)


def test_unreadable_manifest_is_refused_by_name(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")
    with pytest.raises(WeightsError, match=r"manifest\.json can't be read"):
        read_manifest(folder)


def test_curve_survives_a_round_trip(tmp_path: Path) -> None:
    curve = (
        EXACT,
        CurvePoint("router", Policy(0.1, 0.2, 3, 4, 0.5, 0.0, 1, 2), 0.7, 0.8, 0.9, Preset.FAST),
        CurvePoint("residual_cache", Policy(residual_threshold=0.3, max_reuses=4), 0.3, 0.4, 0.5),
    )
    write_curve(tmp_path / "new", curve, "iou", {"device": "cpu"})
    assert read_curve(tmp_path / "new") == (curve, "iou")


def test_folder_without_a_curve_knows_only_the_exact_point(tmp_path: Path) -> None:
    assert read_curve(tmp_path) == ((EXACT,), "ssim")
