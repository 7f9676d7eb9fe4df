"""What is FLUX's alone; what every family does is tested one folder up, and in the engine's tests."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from models.card import Guidance, ImageCard, SizeLimits
from models.curve import EXACT
from models.engine import Engine
from models.errors import InvalidRequest, WeightsError
from models.families.flux import adapter
from models.families.flux.pipeline import FluxFamily
from models.load_options import DEFAULTS
from models.request import ImageRequest
from models.state import DenoiseState
from models.weights import CheckpointTraits, MlpActivation
from models.zoo import load_engine

MODEL = "tiny-flux"
Ask = Callable[..., ImageRequest]
Denoise = Callable[..., DenoiseState]


def test_exact_equals_the_stock_pipeline_of_a_model_without_guidance(
    tiny_schnell: Path, tmp_path: Path, stock_result: Callable[..., Any], ask: Ask, denoise: Denoise
) -> None:
    engine = load_engine([tiny_schnell], device="cpu", router_weights=tmp_path)
    stock = FluxPipeline.from_pretrained(tiny_schnell, dtype=torch.float32, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    request = ask(guidance_scale=0.0)
    expected = stock_result(stock, request, engine)
    assert torch.equal(denoise(engine, request).latents, expected)
    card = engine.cards[MODEL]
    assert card.guidance is Guidance.NONE
    assert (card.default_num_inference_steps, card.default_guidance_scale) == (4, 0.0)


@pytest.mark.parametrize(
    "settings",
    [{"use_dynamic_shifting": True, "shift": 3.0}, {"use_dynamic_shifting": False, "shift": 1.0}],
    ids=["dev and Krea-dev", "schnell"],
)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 96)])
def test_exact_equals_the_stock_pipeline_on_published_schedules(
    tiny_flux: Path,
    tmp_path: Path,
    stock_result: Callable[..., Any],
    ask: Ask,
    denoise: Denoise,
    settings: dict[str, Any],
    height: int,
    width: int,
) -> None:
    directory = Path(shutil.copytree(tiny_flux, tmp_path / "tiny-flux"))
    FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15, **settings
    ).save_pretrained(directory / "scheduler")
    engine = load_engine([directory], device="cpu", router_weights=tmp_path)
    stock = FluxPipeline.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    request = ask(height=height, width=width)
    assert torch.equal(denoise(engine, request).latents, stock_result(stock, request, engine))


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 6.0])
def test_distilled_guidance_is_that_of_the_stock_pipeline(
    engine: Engine,
    stock: FluxPipeline,
    stock_result: Callable[..., Any],
    ask: Ask,
    denoise: Denoise,
    guidance_scale: float,
) -> None:
    request = ask(guidance_scale=guidance_scale)
    expected = stock_result(stock, request, engine)
    latents = denoise(engine, request).latents
    assert torch.equal(latents, expected)
    assert not torch.allclose(latents, denoise(engine, ask()).latents, atol=1e-3)


def test_card_has_sizes_defaults_and_guidance(engine: Engine) -> None:
    card = engine.cards[MODEL]
    assert isinstance(card, ImageCard)
    assert card.family == "flux"
    assert card.guidance is Guidance.DISTILLED
    assert isinstance(card, ImageCard)
    assert (card.default_height, card.default_width) == (64, 64)
    assert card.sizes == SizeLimits(multiple_of=16, minimum=64, maximum=128)
    assert card.max_prompt_characters == 16 * 40
    assert card.blocks == ("double.00", "double.01", "single.00", "single.01", "single.02", "single.03")


def test_defaults_are_those_of_the_model_card_where_there_is_no_manifest(tiny_flux: Path, tmp_path: Path) -> None:
    card = load_engine([tiny_flux], device="cpu", router_weights=tmp_path).cards[MODEL]
    assert isinstance(card, ImageCard)
    assert card.license == "unknown"
    assert (card.default_num_inference_steps, card.default_guidance_scale) == (28, 3.5)
    assert isinstance(card, ImageCard)
    assert (card.default_height, card.default_width) == (64, 64)


@pytest.mark.parametrize(
    "traits",
    [CheckpointTraits(mlp_activation=MlpActivation.GELU_SIGMOID), CheckpointTraits(rescales_guidance=False)],
)
def test_traits_of_another_family_are_refused(tiny_flux: Path, traits: CheckpointTraits) -> None:
    with pytest.raises(
        WeightsError, match="FLUX models have no special traits, but the manifest names CheckpointTraits"
    ):
        FluxFamily.load(tiny_flux, "cpu", torch.float32, None, traits, DEFAULTS)


def test_text_mlp_of_a_double_block_always_runs_in_full(family: FluxFamily) -> None:
    for module in family.blocks[0].variants.values():
        assert module.get_submodule("ff_context.net.2").weight.shape == (32, 128)


def test_rotary_embedding_is_that_of_the_stock_pipeline(family: FluxFamily, stock: FluxPipeline) -> None:
    image_ids = stock._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    expected = stock.transformer.pos_embed(torch.cat((torch.zeros(7, 3), image_ids)))
    for ours, theirs in zip(adapter.rotary_embedding(family.transformer, 7, 4, 6), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("fields", "branches"),
    [
        ({}, ["cond"]),
        ({"negative_prompt": "red", "true_cfg_scale": 1.0}, ["cond"]),
        ({"negative_prompt": "", "true_cfg_scale": 2.0}, ["cond", "uncond"]),
    ],
)
def test_second_branch_needs_a_negative_prompt_and_a_scale(
    family: FluxFamily, ask: Ask, fields: dict[str, object], branches: list[str]
) -> None:
    assert [row.branch for row in family.start(ask(**fields), (EXACT,), EXACT).rows] == branches


def test_all_prompts_have_the_same_number_of_tokens(family: FluxFamily, ask: Ask) -> None:
    """T5's are padded and never masked, as in the stock pipeline, so they all count."""
    states = [family.start(ask(prompt=prompt), (EXACT,), EXACT) for prompt in ("", "red", "a red circle on the left")]
    assert [state.inputs[0].num_text_tokens for state in states] == [40, 40, 40]
    assert family.prologue(states).text_lengths is None


@pytest.mark.parametrize("param", ["prompt", "negative_prompt"])
def test_prompt_with_too_many_tokens_is_refused(engine: Engine, ask: Ask, param: str) -> None:
    longest = " ".join(["red"] * 39)
    fields = {"negative_prompt": "", "true_cfg_scale": 2.0}
    engine.start(ask(**fields | {param: longest}))
    with pytest.raises(InvalidRequest, match=f"{param} has 41 tokens; {MODEL} reads at most 40") as error:
        engine.start(ask(**fields | {param: longest + " red"}))
    assert error.value.param == param


def test_sizes_are_multiples_of_a_latent_patch(family: FluxFamily) -> None:
    assert family.pixels_per_token == 16
    assert family.max_sequence_length == 40
