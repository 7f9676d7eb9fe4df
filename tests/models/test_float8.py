from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from models.elastic.plan import MLP_WIDTHS
from models.elastic.width import narrowed
from models.engine import Engine
from models.families.family import Family
from models.float8 import Float8Linear
from models.load_options import LoadOptions, Weights
from models.loading import stream_module
from models.request import GenerationRequest
from models.state import DenoiseState
from models.weights import CheckpointTraits, load_router_weights
from models.zoo import load_engine
from tests.fixtures.kinds import Kind

FLOAT8 = LoadOptions(weights=Weights.FLOAT8)


@pytest.fixture(scope="module")
def float8_family(kind: Kind, directory: Path, router_weights: Path) -> Family:
    routers = load_router_weights(router_weights / kind.model, directory)
    loaded: Family = kind.family.load(directory, "cpu", torch.float32, routers, CheckpointTraits(), FLOAT8)
    return loaded


def stored(weight: Tensor, bias: Tensor | None = None) -> Float8Linear:
    layer = Float8Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.store(weight, "cpu")
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return layer


def values(layer: Float8Linear) -> Tensor:
    """The weight that the stored bytes stand for."""
    return layer.weight.view(torch.float8_e4m3fn).float() * layer.scale


@pytest.mark.parametrize("deviation", [1e-6, 0.005, 0.1, 1000.0])
def test_weights_of_any_size_keep_three_bits_of_mantissa(deviation: float) -> None:
    weight = deviation * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    assert (values(stored(weight)) - weight).norm() / weight.norm() < 0.03
    assert torch.equal(values(stored(0 * weight)), 0 * weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_twin_computes_with_a_view_of_the_stored_weight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    first = stored(torch.randn(32, 16, generator=generator), torch.randn(32, generator=generator).to(dtype))
    last = stored(0.01 * torch.randn(16, 32, generator=generator))
    twin = narrowed(nn.ModuleDict({"first": first, "last": last}), {"first": 8}, {"last": 8})
    narrow_first, narrow_last = twin.get_submodule("first"), twin.get_submodule("last")
    x = torch.randn(2, 3, 16, generator=generator).to(dtype)
    assert torch.equal(narrow_first(x), F.linear(x, values(first)[:8].to(dtype), first.bias[:8]))
    assert torch.equal(narrow_last(x[..., :8]), F.linear(x[..., :8], values(last)[:, :8].to(dtype)))
    for narrow, whole in ((narrow_first, first), (narrow_last, last)):
        weight = narrow.get_parameter("weight")
        assert weight.untyped_storage().data_ptr() == whole.weight.untyped_storage().data_ptr()


def test_only_matrices_of_blocks_are_stored_as_bytes(kind: Kind, family: Family, float8_family: Family) -> None:
    for name, module in kind.modules(float8_family).items():
        full = dict(kind.modules(family)[name].named_parameters())
        narrow = {key for key, tensor in module.named_parameters() if tensor.element_size() < full[key].element_size()}
        assert bool(narrow) is (name != "vae")
        for key in narrow:
            assert full[key].ndim == 2
            assert any(part.isdigit() for part in key.split("."))
            assert not any(word in key for word in ("embed", ".gate.", "bias"))
    size, full_size = (sum(p.nbytes for p in f.transformer.parameters()) for f in (float8_family, family))
    assert size < full_size / 2  # a quarter, and the layers before and after the blocks, which are large here


def test_twins_of_all_widths_share_the_stored_bytes(float8_family: Family) -> None:
    for block in float8_family.blocks:
        whole = {
            t.untyped_storage().data_ptr() for t in (*block.variants[1].parameters(), *block.variants[1].buffers())
        }
        for width in MLP_WIDTHS:
            assert {t.untyped_storage().data_ptr() for t in block.variants[width].parameters()} <= whole


def test_every_family_generates_nearly_what_full_weights_do(
    family: Family,
    float8_family: Family,
    engine: Engine,
    ask: Callable[..., GenerationRequest],
    denoise: Callable[..., DenoiseState],
) -> None:
    full, float8 = (
        denoise(Engine({loaded.model_id: loaded}, engine.cards), ask()).latents for loaded in (family, float8_family)
    )
    assert 0 < (float8 - full).norm() / full.norm() < 0.1


def test_weights_that_are_float8_already_are_kept(tiny_flux: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "transformer").mkdir()
    (folder / "config.json").write_text((tiny_flux / "transformer" / "config.json").read_text())
    file, name = "diffusion_pytorch_model.safetensors", "transformer_blocks.0.ff.net.2.weight"
    tensors = load_file(tiny_flux / "transformer" / file)
    tensors = {key: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for key, t in tensors.items()}
    save_file(tensors, folder / file)
    layer = stream_module(FluxTransformer2DModel, folder, "cpu", torch.float32, in_float8=True).get_submodule(
        name.removesuffix(".weight")
    )
    assert isinstance(layer, Float8Linear)
    assert layer.scale == 1
    assert torch.equal(values(layer), tensors[name].float())


def test_only_bytes_go_to_the_device(tiny_flux: Path) -> None:
    class Arrivals(TorchDispatchMode):
        """Counts bytes that are copied to the meta device, which stands for an accelerator."""

        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if "_to_copy" in str(func) and result.is_meta and args[0].device.type == "cpu":
                self.total += result.nbytes
            return result

    totals = []
    for in_float8 in (False, True):
        with Arrivals() as arrivals:  # type: ignore[no-untyped-call]  # torch leaves it without types
            module = stream_module(
                FluxTransformer2DModel, tiny_flux / "transformer", "meta", torch.bfloat16, in_float8=in_float8
            )
        totals.append(arrivals.total)
    num_stored = sum(part.weight.numel() for part in module.modules() if isinstance(part, Float8Linear))
    assert totals[0] - totals[1] == num_stored > 0


@pytest.mark.parametrize(
    ("device", "weights", "dtype"),
    [
        ("cpu", Weights.AUTO, torch.float32),
        ("cpu:0", Weights.AUTO, torch.bfloat16),
        ("cpu", Weights.BFLOAT16, torch.bfloat16),
        ("cpu:0", Weights.FLOAT32, torch.float32),
        ("cpu:0", Weights.FLOAT8, torch.bfloat16),
    ],
)
def test_weights_say_what_models_compute_in(
    device: str, weights: Weights, dtype: torch.dtype, tiny_flux: Path, tmp_path: Path
) -> None:
    engine = load_engine([tiny_flux], device=device, router_weights=tmp_path, options=LoadOptions(weights=weights))
    assert engine._families[tiny_flux.name].transformer.dtype == dtype
