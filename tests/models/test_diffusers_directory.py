"""What published directories hold besides plain weight files is read, or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import nn

from models.errors import WeightsError
from models.load_options import DEFAULTS
from models.loading import stream_pipeline
from models.zoo import load_engine

NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2")


def load(directory: Path) -> DiffusionPipeline:
    return stream_pipeline(FluxPipeline, directory, "cpu", torch.float32, options=DEFAULTS)


def edit_json(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.fixture
def copy(tiny_flux: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_flux, tmp_path / "flux"))


@pytest.mark.parametrize("part", NETWORKS)
@pytest.mark.parametrize(
    ("quantisation", "method"),
    [({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"), (1, "None")],
)
def test_quantised_weights_are_refused_by_name(copy: Path, part: str, quantisation: Any, method: str) -> None:
    edit_json(copy / part / "config.json", quantization_config=quantisation)
    with pytest.raises(WeightsError, match=rf"{part}/config.json is of quantised .* quant_method {method}\)"):
        load(copy)


@pytest.mark.parametrize("max_shard_size", ["10GB", "100KB"], ids=["whole", "shards"])
@pytest.mark.parametrize("parts", [NETWORKS, ("text_encoder_2",), ("transformer",)], ids=["all", "t5", "transformer"])
def test_files_of_a_variant_are_found(tiny_flux: Path, copy: Path, parts: tuple[str, ...], max_shard_size: str) -> None:
    stock = FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32, local_files_only=True)
    for name in parts:
        for file in (copy / name).glob("*.safetensors"):
            file.unlink()
        stock.components[name].save_pretrained(copy / name, variant="fp16", max_shard_size=max_shard_size)
    loaded = load(copy)
    for name in NETWORKS:
        module: nn.Module = loaded.components[name]
        expected = stock.components[name].state_dict()
        assert module.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in module.state_dict().items())


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_variants_are_not_chosen_among(copy: Path, part: str) -> None:
    (plain,) = (copy / part).glob("*.safetensors")
    for variant in ("fp16", "bf16"):
        shutil.copy(plain, plain.with_suffix(f".{variant}.safetensors"))
    load(copy)  # the plain file counts
    plain.unlink()
    with pytest.raises(WeightsError, match="several variants: bf16, fp16; remove all but one"):
        load(copy)


FLUX_DEV = """---
language: [en]
license: other
license_name: flux-1-dev-non-commercial-license
license_link: LICENSE.md
---
# FLUX.1
"""


@pytest.mark.parametrize(
    ("readme", "license"),
    [
        (FLUX_DEV, "flux-1-dev-non-commercial-license"),
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("# No front matter\n", "unknown"),
        ("---\n[broken\n---\n", "unknown"),
        (None, "unknown"),
    ],
)
def test_licence_of_a_published_repository_is_named(
    tiny_flux: Path, tmp_path: Path, readme: str | None, license: str
) -> None:
    directory = tmp_path / "repository" / "flux"
    directory.parent.mkdir()
    directory.symlink_to(tiny_flux)
    if readme is not None:
        (directory.parent / "README.md").write_text(readme)
    assert load_engine([directory], device="cpu", router_weights=tmp_path).cards["flux"].license == license
