"""A family in diffusers' layout is one folder, here `toy_family`, and one line in the table of families."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from models.curve import EXACT, Preset
from models.diffusion.sampling import classifier_free_guidance, euler_step
from models.engine import Engine
from models.errors import WeightsError
from models.families import FAMILIES
from models.request import ImageRequest, PresetBudget
from models.state import DenoiseState
from models.zoo import load_engine
from tests.models.families import toy_family
from tests.models.families.toy_family.pipeline import letters_of
from tests.models.families.toy_family.transformer import ToyTransformer

Denoise = Callable[..., DenoiseState]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny-toy"
    torch.manual_seed(0)
    ToyTransformer().save_pretrained(directory / "transformer")
    (directory / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline"}))
    return directory


@pytest.fixture
def toy_engine(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setitem(FAMILIES, "toy", toy_family.ENTRY)
    return load_engine([directory], device="cpu", router_weights=tmp_path / "router_weights")


def test_directory_of_a_family_that_is_not_in_the_table_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="names the class ToyPipeline; served are: FluxPipeline"):
        load_engine([directory], device="cpu", router_weights=tmp_path)


def test_one_line_of_the_table_serves_a_new_family_exactly(
    directory: Path, toy_engine: Engine, denoise: Denoise
) -> None:
    # Given a request for the new model, as its card describes it
    card = toy_engine.cards["tiny-toy"]
    assert (card.family, card.blocks) == ("toy", ("block.00", "block.01", "block.02"))
    request = ImageRequest(
        model=card.id,
        prompt="a red circle",
        negative_prompt="blue",
        height=24,
        width=32,
        num_inference_steps=3,
        guidance_scale=2.0,
        seed=5,
        budget=PresetBudget(Preset.EXACT),
        point=EXACT,
        is_guided=card.is_guided(2.0),
    )
    # When the engine serves it
    state = denoise(toy_engine, request)
    # Then the result is that of the plain model, bit for bit
    transformer = ToyTransformer.from_pretrained(directory / "transformer").requires_grad_(False)
    letters = torch.cat([letters_of(prompt) for prompt in ("a red circle", "blue")])
    latents = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(5))
    for sigma, next_sigma in pairwise(torch.linspace(1, 0, 4)):
        cond, uncond = transformer(latents.repeat(2, 1, 1), sigma.repeat(2), letters).split(1)
        latents = euler_step(latents, classifier_free_guidance(cond, uncond, 2.0), sigma, next_sigma)
    assert torch.equal(state.latents, latents)
    assert state.summary().exact_tolerance == 0
    image = toy_engine.finish(state)
    assert isinstance(image, np.ndarray)
    assert image.shape == (24, 32, 3)
    assert len(np.unique(image)) > 10


def test_family_that_computes_otherwise_says_how_far_it_may_be_off(
    toy_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = toy_engine._families["tiny-toy"]
    monkeypatch.setattr(family, "exact_tolerance", 0.01)
    state = toy_engine.start(family.example_request(toy_engine.cards["tiny-toy"]))
    assert state.summary().exact_tolerance == 0.01
