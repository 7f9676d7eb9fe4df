import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from benchmarks import field, meshes
from models.curve import Preset
from models.families.hunyuan3d.checkpoint import load_checkpoint
from models.families.hunyuan3d.conditioner import SingleImageEncoder
from models.families.hunyuan3d.plain_dit import HunYuanDiTPlain
from models.families.hunyuan3d.shape_vae import ShapeVAE
from models.request import PresetBudget
from models.zoo import load_engine
from training.solids.shape_vae import VAE_PARAMS

DENOISER = {
    "in_channels": VAE_PARAMS["embed_dim"],
    "hidden_size": 32,
    "context_dim": 24,
    "depth": 5,
    "num_heads": 2,
    "num_moe_layers": 1,
    "num_experts": 3,
    "moe_top_k": 2,
    "qkv_bias": False,
    "qk_norm": True,
}
DINO = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
CONDITIONER = {"main_image_encoder": {"type": "DinoImageEncoder", "kwargs": {"config": DINO, "image_size": 28}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with random weights, whose field has a surface."""
    directory = tmp_path_factory.mktemp("models") / "random-hunyuan3d"
    directory.mkdir()
    torch.manual_seed(0)
    modules = nn.ModuleDict(
        {
            "model": HunYuanDiTPlain(**DENOISER),
            "vae": ShapeVAE(**VAE_PARAMS),
            "conditioner": SingleImageEncoder(**CONDITIONER),
        }
    )
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
            elif "output_proj" in name:
                parameter.zero_()
    parts = {
        "model": ("HunYuanDiTPlain", DENOISER),
        "vae": ("ShapeVAE", {**VAE_PARAMS, "scale_factor": 1.1}),
        "conditioner": ("SingleImageEncoder", CONDITIONER),
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {}),
        "image_processor": ("ImageProcessorV2", {"size": 32, "border_ratio": 0.15}),
    }
    config = {name: {"target": f"published.{cls}", "params": params} for name, (cls, params) in parts.items()}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    save_file(modules.state_dict(), directory / "model.safetensors")
    return directory


def test_the_plain_loop_gives_the_engines_exact_result(model: Path) -> None:
    """Otherwise a ratio of their times would mean nothing. Two requests share a batch, as in the timed runs."""
    engine = load_engine([model], device="cpu", router_weights=model.parent / "none")
    requests = meshes.requests_for(engine, model.name, meshes.held_out_solids(2), PresetBudget(Preset.EXACT))
    states = [engine.start(request) for request in requests]
    while not states[0].is_done:
        engine.step(states)
    latents, _ = meshes.stock_denoise(load_checkpoint(model, "cpu", torch.float32), requests)
    torch.testing.assert_close(torch.cat([state.latents for state in states]), latents, atol=1e-4, rtol=1e-4)


def test_shape_without_a_surface_has_similarity_zero() -> None:
    similarity = meshes.compare(None, meshes.held_out_solids(1)[0])
    assert (similarity.iou, similarity.f_score) == (0, 0)


def run(
    module: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
    module.main()  # type: ignore[attr-defined]
    result: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.long
def test_meshes_are_timed_judged_and_drawn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        f"--rounds 1 --batches 1 --solids 2 --octree-resolution 32 --caps --router-weights {model.parent / 'none'}"
    )
    sheet = tmp_path / "docs" / "sheet.png"
    result = run(meshes, monkeypatch, capsys, "--model", str(model), *options.split(), "--sheet", str(sheet))
    assert [row["name"] for row in result["time"]] == ["stock", "exact"]
    (exact,) = result["quality"]
    assert exact["compute_ratio"] == 1
    assert exact["mean_mlp_width"] == 1
    if not exact["empty"]:
        assert exact["iou_exact"] == 1
    (taught,) = result["quality_of_taught_combinations"]
    assert 0 <= exact["iou_true"] < 1
    assert 0 <= taught["iou_true"] < 1
    with Image.open(sheet) as image:
        assert image.width > 3 * 192


@pytest.mark.parametrize("of", ["true", "model"])
@pytest.mark.slow
@pytest.mark.long
def test_coarse_to_fine_is_timed_and_compared_with_the_dense_grid(
    of: str, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 128, the lowest resolution at which it saves anything. A random decoder's field may be arbitrarily rough."""
    options = ["--resolutions", "128", "--solids", "1", "--device", "cpu"]
    if of == "model":
        options += ["--model", str(model)]
    (row,) = run(field, monkeypatch, capsys, *options)["decodes"]
    assert row["evaluated"] < 1
    assert row["distance"] < 0.01
