import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.curve import EXACT, ComputedSteps, CurvePoint, Preset
from models.elastic.router import RouterStack
from models.errors import WeightsError
from models.rules import policy_entry
from models.rules.dense import DensePolicy
from models.rules.router import RouterPolicy
from models.weights import (
    CheckpointTraits,
    Manifest,
    MlpActivation,
    RouterWeights,
    load_router_weights,
    read_curve,
    read_manifest,
    save_router_weights,
    sha256,
    write_curve,
)
from models.zoo import load_engine


@pytest.fixture
def folder(router_weights: Path, model: str, tmp_path: Path) -> Path:
    """A copy of the router folder that a test may spoil."""
    return Path(shutil.copytree(router_weights / model, tmp_path / "routers" / model))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def replace_stack(folder: Path, stack: RouterStack) -> None:
    save_router_weights(RouterWeights(stack), folder)
    edit_manifest(folder, lambda c: c["sha256"].update({"router.safetensors": sha256(folder / "router.safetensors")}))


def test_router_weights_survive_a_round_trip_in_sixteen_bits(tmp_path: Path) -> None:
    stack = RouterStack(3, 8, hidden=4)
    save_router_weights(RouterWeights(stack), tmp_path)
    (tmp_path / "manifest.json").write_text('{"sha256": {}}')
    loaded = load_router_weights(tmp_path, tmp_path / "model")
    assert loaded is not None
    for name, tensor in loaded.stack.state_dict().items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, stack.state_dict()[name].half())
    assert not any(parameter.requires_grad for parameter in loaded.stack.parameters())


def test_folder_without_routers_gives_none(tmp_path: Path) -> None:
    assert load_router_weights(tmp_path, tmp_path / "model") is None


@pytest.mark.parametrize("name", ["router.safetensors", "transformer/diffusion_pytorch_model.safetensors"])
def test_file_with_another_hash_is_refused_by_name(folder: Path, directory: Path, name: str) -> None:
    edit_manifest(folder, lambda content: content["sha256"].update({name: "0" * 64}))
    with pytest.raises(WeightsError, match=f"{name}.* sha256 differs"):
        load_router_weights(folder, directory)


def test_changed_router_file_is_refused(folder: Path, directory: Path) -> None:
    tensors = load_file(folder / "router.safetensors")
    tensors["gate_mlps.0.out.2.bias"] += 1
    save_file(tensors, folder / "router.safetensors")
    with pytest.raises(WeightsError, match=r"router\.safetensors"):
        load_router_weights(folder, directory)


def test_file_that_the_model_lacks_is_refused_by_name(folder: Path, directory: Path) -> None:
    edit_manifest(folder, lambda content: content["sha256"].update({"transformer/other.safetensors": "0" * 64}))
    with pytest.raises(WeightsError, match=r"transformer/other\.safetensors"):
        load_router_weights(folder, directory)


def test_routers_without_a_manifest_are_refused(folder: Path, directory: Path) -> None:
    (folder / "manifest.json").unlink()
    with pytest.raises(WeightsError, match=r"manifest\.json"):
        load_router_weights(folder, directory)


def test_manifest_without_hashes_is_refused(folder: Path, directory: Path) -> None:
    edit_manifest(folder, lambda content: content.pop("sha256"))
    with pytest.raises(WeightsError, match=r"manifest\.json"):
        load_router_weights(folder, directory)


@pytest.mark.parametrize("tensor", ["gate_mlps.0.out.0.weight", "gate_mlps.3.width_head.bias"])
def test_routers_that_lack_a_tensor_are_refused(folder: Path, directory: Path, tensor: str) -> None:
    tensors = load_file(folder / "router.safetensors")
    del tensors[tensor]
    save_file(tensors, folder / "router.safetensors")
    edit_manifest(folder, lambda c: c["sha256"].update({"router.safetensors": sha256(folder / "router.safetensors")}))
    with pytest.raises(WeightsError, match=r"router\.safetensors"):
        load_router_weights(folder, directory)


@pytest.mark.parametrize(
    "stack",
    [RouterStack(4, 32, 16), RouterStack(7, 32, 16), RouterStack(6, 16, 16)],
    ids=["too few", "too many", "too narrow"],
)
def test_routers_of_another_model_are_refused(folder: Path, directory: Path, stack: RouterStack) -> None:
    replace_stack(folder, stack)
    size = f"{len(stack.routers)} blocks of {stack.routers[0].trunk.in_features} channels"
    with pytest.raises(WeightsError, match=f"the routers are for {size}, the model has . of 32"):
        load_engine([directory], device="cpu", router_weights=folder.parent)


def write_manifest(folder: Path, **entries: Any) -> None:
    defaults = {"num_inference_steps": 4, "guidance_scale": 2.5}
    (folder / "manifest.json").write_text(json.dumps({"license": "mit", "defaults": defaults} | entries))


def test_manifest_tells_terms_and_defaults(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    assert read_manifest(tmp_path) == Manifest("mit", 4, 2.5)


def test_manifest_may_tell_a_size(tmp_path: Path) -> None:
    write_manifest(tmp_path, defaults={"num_inference_steps": 9, "guidance_scale": 0, "height": 64, "width": 96})
    assert read_manifest(tmp_path) == Manifest("mit", 9, 0.0, height=64, width=96)


@pytest.mark.parametrize(
    ("entries", "traits"),
    [
        ({}, CheckpointTraits(MlpActivation.GELU_TANH, rescales_guidance=True)),
        ({"mlp_activation": "gelu-sigmoid"}, CheckpointTraits(mlp_activation=MlpActivation.GELU_SIGMOID)),
        ({"rescales_guidance": False}, CheckpointTraits(rescales_guidance=False)),
    ],
)
def test_manifest_may_tell_traits_of_the_checkpoint(
    tmp_path: Path, entries: dict[str, Any], traits: CheckpointTraits
) -> None:
    write_manifest(tmp_path, traits=entries)
    manifest = read_manifest(tmp_path)
    assert manifest == Manifest("mit", 4, 2.5, traits=traits)
    assert manifest.traits.mlp_activation is traits.mlp_activation


def test_manifest_may_tell_published_policies(tmp_path: Path) -> None:
    published = RouterPolicy(skip_threshold=0.5, max_reuses=3), RouterPolicy()
    write_manifest(tmp_path, published_policies=[policy_entry(policy) for policy in published])
    assert read_manifest(tmp_path).published_policies == (
        RouterPolicy(skip_threshold=0.5, max_reuses=3),
        RouterPolicy(),
    )


@pytest.mark.parametrize(
    ("traits", "message"),
    [
        (None, "get"),
        ({"rescales_guidance": "no"}, "rescales_guidance"),
        ({"mlp_activation": "relu"}, "relu"),
        ({"rescales_guidanec": False}, "rescales_guidanec"),
    ],
    ids=["no object", "no boolean", "unknown activation", "unknown trait"],
)
def test_malformed_traits_are_refused(tmp_path: Path, traits: Any, message: str) -> None:
    write_manifest(tmp_path, traits=traits)
    with pytest.raises(WeightsError, match=rf"manifest\.json has no proper entry .*{message}"):
        read_manifest(tmp_path)


def test_folder_without_a_manifest_assumes_nothing(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == Manifest(None, None, None, None, None, None, CheckpointTraits())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"defaults": None}, "NoneType"),
        ({"defaults": {"guidance_scale": 1.0}}, "'num_inference_steps'"),
        ({"defaults": {"num_inference_steps": 4, "guidance_scale": 1.0, "height": "tall"}}, "tall"),
    ],
)
def test_malformed_defaults_are_refused(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    write_manifest(tmp_path, **entries)
    with pytest.raises(WeightsError, match=rf"manifest\.json has no proper entry .*{message}"):
        read_manifest(tmp_path)


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
        CurvePoint(RouterPolicy(0.1, 0.2, 3, 4, 0.5, 1, 2), 0.7, 0.8, 0.9, 0.95, Preset.FAST),
        CurvePoint(DensePolicy(), 0.5, 0.5, 0.7, 0.8, steps=ComputedSteps(10, 20)),
    )
    write_curve(tmp_path / "new", curve, "iou", {"device": "cpu"})
    assert read_curve(tmp_path / "new", "iou") == curve
    with pytest.raises(WeightsError, match="has quality in iou, the model is measured by ssim"):
        read_curve(tmp_path / "new", "ssim")


def test_folder_without_a_curve_knows_only_the_exact_point(tmp_path: Path) -> None:
    assert read_curve(tmp_path, "ssim") == (EXACT,)
