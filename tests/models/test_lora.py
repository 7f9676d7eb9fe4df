"""Models with low-rank adapters in their weights equal diffusers' own fused pipelines."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.engine import Engine
from models.errors import WeightsError
from models.float8 import Float8Linear
from models.load_options import LoadOptions, Lora, Weights
from models.loading import stream_pipeline
from models.zoo import load_engine
from tests.fixtures.engines import write_manifest
from tests.fixtures.kinds import Kind

TARGETS = ["to_q", "to_out.0", "proj_mlp", "net.2", "add_k_proj"]
FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session", params=["flux", "qwen_image"])
def kind(kind: Any) -> Any:
    """The families of diffusers pipelines."""
    return kind


def adapt(module: nn.Module, targets: list[str], seed: int) -> dict[str, Tensor]:
    """Give a module a random adapter, and return its tensors."""
    module.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets))  # type: ignore[operator]
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=rng)
    tensors: dict[str, Tensor] = get_peft_model_state_dict(module)
    return tensors


@pytest.fixture
def loras(kind: Kind, directory: Path, tmp_path: Path) -> Mapping[str, Lora]:
    found = {}
    for seed, (name, scale) in enumerate({"style": 0.7, "detail": -1.0}.items()):
        stock = kind.load_stock(directory)
        layers = {"transformer_lora_layers": adapt(stock.transformer, TARGETS, seed)}
        if kind.model == "tiny-flux" and name == "style":
            layers["text_encoder_lora_layers"] = adapt(stock.text_encoder, ["q_proj"], seed)
        stock.save_lora_weights(tmp_path / name, **layers)
        found[name] = Lora(tmp_path / name / FILE, scale)
    return found


def load(kind: Kind, directory: Path, names: str, loras: Mapping[str, Lora], tmp_path: Path) -> Engine:
    """The engine of a directory with the adapters in `names`, such as +style."""
    model = directory.with_name(directory.name + names)
    write_manifest(tmp_path / model.name, kind.defaults)
    return load_engine([model], device="cpu", router_weights=tmp_path, options=LoadOptions(loras=loras))


@pytest.mark.parametrize("names", ["+style", "+detail+style"])
def test_exact_equals_the_stock_pipeline_with_fused_adapters(
    kind: Kind,
    directory: Path,
    stock_result: Callable[..., Any],
    loras: Mapping[str, Lora],
    names: str,
    ask: Callable[..., Any],
    denoise: Callable[..., Any],
    tmp_path: Path,
) -> None:
    engine = load(kind, directory, names, loras, tmp_path)
    assert [*engine.cards] == [directory.name + names]
    request = ask(model=directory.name + names)
    latents = denoise(engine, request).latents
    stock = kind.load_stock(directory)
    plain = stock_result(stock, request, engine)
    used = names.split("+")[1:]
    for name in used:
        with warnings.catch_warnings(action="ignore"):
            stock.load_lora_weights(loras[name].file.parent, weight_name=FILE, adapter_name=name)
    stock.set_adapters(used, [loras[name].scale for name in used])
    stock.fuse_lora([part for part in ("transformer", "text_encoder") if hasattr(getattr(stock, part), "peft_config")])
    assert torch.equal(latents, stock_result(stock, request, engine))
    assert not torch.allclose(latents, plain, atol=1e-2)


def test_adapters_are_added_before_weights_are_stored_in_float8(
    kind: Kind, directory: Path, loras: Mapping[str, Lora]
) -> None:
    assert kind.pipeline is not None
    model = directory.with_name(f"{directory.name}+style")
    full, stored = (
        stream_pipeline(kind.pipeline, model, "cpu", torch.float32, options=LoadOptions(weights=weights, loras=loras))
        for weights in (Weights.AUTO, Weights.FLOAT8)
    )
    layers = {name: m for name, m in stored.transformer.named_modules() if isinstance(m, Float8Linear)}
    assert any(TARGETS[0] in name for name in layers)
    for name, layer in layers.items():
        weight = full.transformer.get_submodule(name).weight
        assert (layer.weight.view(torch.float8_e4m3fn).float() * layer.scale - weight).norm() < 0.03 * weight.norm()


def spoil_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("blocks.0", "blocks.9"): tensor for name, tensor in tensors.items()}


def spoil_shapes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:, :1].clone() if "lora_A" in name else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_names, r"the model has no place for transformer\..*blocks\.9"),
        (spoil_shapes, "can't be used as an adapter"),
        (lambda tensors: {"mean": torch.zeros(2)}, "can't be used as an adapter"),
    ],
    ids=["names", "shapes", "no adapter"],
)
def test_adapter_that_does_not_fit_is_named(
    kind: Kind, directory: Path, loras: Mapping[str, Lora], spoil: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    file = loras["style"].file
    save_file(spoil(load_file(file)), file)
    with pytest.raises(WeightsError, match=message) as caught:
        load(kind, directory, "+style", loras, tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_adapters_are_named(kind: Kind, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="names no adapter 'stile'; there are: style"):
        load(kind, directory, "+stile", {"style": Lora(tmp_path / FILE)}, tmp_path)


def test_mesh_models_take_no_adapters(tiny_plain_hunyuan3d: Path, tmp_path: Path) -> None:
    model = tiny_plain_hunyuan3d.with_name(tiny_plain_hunyuan3d.name + "+style")
    options = LoadOptions(loras={"style": Lora(tmp_path / FILE)})
    with pytest.raises(WeightsError, match=r"takes no adapters \(style\)"):
        load_engine([model], device="cpu", router_weights=tmp_path, options=options)
