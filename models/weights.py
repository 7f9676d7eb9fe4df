"""Router weights, manifests and calibration curves: one folder per model, safetensors and JSON only."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.curve import EXACT, CurvePoint, point_entry, point_of
from models.elastic.plan import Policy
from models.elastic.router import RouterStack
from models.errors import WeightsError
from models.rules import policy_of

ROUTER_FILE = "router.safetensors"


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """A model's routers."""

    stack: RouterStack


class MlpActivation(StrEnum):
    """The activation that a checkpoint's MLPs were trained with: diffusers' GELU, or x * sigmoid(1.702 x)."""

    GELU_TANH = "gelu-tanh"
    GELU_SIGMOID = "gelu-sigmoid"


@dataclass(frozen=True, slots=True)
class CheckpointTraits:
    """Differences in computation between checkpoints of one class.

    `rescales_guidance` says whether a guided velocity is rescaled to the norm of the conditional one, as in diffusers.
    """

    mlp_activation: MlpActivation = MlpActivation.GELU_TANH
    rescales_guidance: bool = True


@dataclass(frozen=True, slots=True)
class Manifest:
    """The entries of `manifest.json` that serving needs.

    The licence, the request defaults (None leaves the family's default; height and width in pixels), the checkpoint's
    traits, and the policies that its authors used with its routers.
    """

    license: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    octree_resolution: int | None = None
    traits: CheckpointTraits = CheckpointTraits()
    published_policies: tuple[Policy, ...] = ()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a router folder, an empty one if the folder has none. Raises WeightsError if it is malformed."""
    path = folder / "manifest.json"
    if not path.exists():
        return Manifest()
    content = read_json(path)
    try:
        defaults, traits = content["defaults"], content.get("traits", {})
        if not isinstance(traits.get("rescales_guidance", True), bool):
            raise ValueError("rescales_guidance, which is true or false")
        return Manifest(
            license=content["license"],
            num_inference_steps=int(defaults["num_inference_steps"]),
            guidance_scale=float(defaults["guidance_scale"]),
            height=int(defaults["height"]) if "height" in defaults else None,
            width=int(defaults["width"]) if "width" in defaults else None,
            octree_resolution=int(defaults["octree_resolution"]) if "octree_resolution" in defaults else None,
            traits=CheckpointTraits(
                **traits | {"mlp_activation": MlpActivation(traits.get("mlp_activation", MlpActivation.GELU_TANH))}
            ),
            published_policies=tuple(policy_of(entry) for entry in content.get("published_policies", ())),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} has no proper entry {error}") from error


def write_manifest(folder: Path, model_directory: Path, transformer_file: str, content: Mapping[str, Any]) -> None:
    """Write `content` as a router folder's manifest, with the hashes by which `load_router_weights` knows its files.

    `transformer_file`, relative to the model directory, stands for the transformer.
    """
    digests = {
        ROUTER_FILE: sha256(folder / ROUTER_FILE),
        transformer_file: sha256(model_directory / transformer_file),
    }
    (folder / "manifest.json").write_text(json.dumps({**content, "sha256": digests}, indent=1) + "\n")


def load_router_weights(folder: Path, model_directory: Path) -> RouterWeights | None:
    """Routers from `folder`, in the type that the file has, None if it has none.

    Raises WeightsError as `router_tensors_in` does, if the tensors do not fit, or if the routers were trained for
    another order of hidden neurons than the transformer's file has.
    """
    path = folder / ROUTER_FILE
    if not path.exists():
        return None
    tensors = router_tensors_in(folder, model_directory)
    if neuron_orders_in(tensors):
        raise WeightsError(
            f"{path} asks for another order of the hidden neurons of {model_directory}; write the model and its "
            f"routers anew in that order: elastic-dit convert --format reorder --src {model_directory} --out "
            f"{model_directory}-in-order"
        )
    try:
        stack = router_stack({k: v for k, v in tensors.items() if k.startswith("gate_mlps.")})
    except (KeyError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{path}: {error}") from error
    return RouterWeights(stack)


def router_tensors_in(folder: Path, model_directory: Path) -> dict[str, Tensor]:
    """All tensors of the router file in `folder`, which is there.

    Raises WeightsError if a file is not the one that the manifest names by hash, of the routers or of the transformer
    that they were trained for.
    """
    path = folder / ROUTER_FILE
    digests = read_json(folder / "manifest.json").get("sha256")
    if not isinstance(digests, dict):
        raise WeightsError(f"{folder / 'manifest.json'} has no proper entry 'sha256'")
    for name, digest in digests.items():
        file = path if name == path.name else model_directory / name
        if not file.exists() or sha256(file) != digest:
            raise WeightsError(f"{file} is not the file that {folder / 'manifest.json'} names: its sha256 differs")
    return load_file(path)


def neuron_orders_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The order of hidden neurons that a router file asks for, by names of MLPs. Earlier versions wrote such files."""
    prefix = "neuron_order."
    return {name.removeprefix(prefix): order for name, order in tensors.items() if name.startswith(prefix)}


def router_stack(tensors: Mapping[str, Tensor]) -> RouterStack:
    """Routers of these tensors, which aren't copied. Raises KeyError, ValueError or RuntimeError if they don't fit."""
    num_blocks = len({name.split(".")[1] for name in tensors})
    hidden, channels = tensors["gate_mlps.0.out.0.weight"].shape
    with torch.device("meta"):  # sixty routers of 3072 channels are 4.6 GB in float32
        stack = RouterStack(num_blocks, channels, hidden)
    stack.load_state_dict(tensors, assign=True)
    return stack.eval().requires_grad_(False)


def save_router_weights(weights: RouterWeights, folder: Path) -> None:
    """Write `router.safetensors` in 16 bits."""
    tensors = {name: tensor.half().contiguous() for name, tensor in weights.stack.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ROUTER_FILE)


def read_curve(folder: Path, quality_metric: str) -> tuple[CurvePoint, ...]:
    """The calibration curve in a router folder; only the exact point if it has none.

    Raises WeightsError if its quality is not in `quality_metric`, or a point is malformed or of no rule that there is.
    """
    path = folder / "calibration.json"
    if not path.exists():
        return (EXACT,)
    content = read_json(path)
    if content["quality_metric"] != quality_metric:
        metric = content["quality_metric"]
        raise WeightsError(f"{path} has quality in {metric}, the model is measured by {quality_metric}")
    try:
        return tuple(point_of(entry) for entry in content["curve"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} has a malformed point: {error!r}") from error
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}; calibrate the model again") from error


def write_curve(folder: Path, curve: tuple[CurvePoint, ...], quality_metric: str, measured: Mapping[str, Any]) -> Path:
    """Write `calibration.json`; `measured` says how: prompts, steps, device, versions."""
    content = {"quality_metric": quality_metric, "measured": measured, "curve": [point_entry(point) for point in curve]}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "calibration.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} is not a JSON object")
    return content
