"""What is FLUX.1-Kontext's alone; see also `test_references.py` and the engine's tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxKontextPipeline

from models.engine import Engine
from models.families.flux import adapter
from models.families.flux_kontext.pipeline import FluxKontextFamily
from models.request import ImageRequest
from models.state import DenoiseState
from models.zoo import load_engine

Ask = Callable[..., ImageRequest]
Denoise = Callable[..., DenoiseState]


def test_without_a_picture_it_draws_what_the_stock_pipeline_draws(
    engine: Engine, stock: FluxKontextPipeline, stock_result: Callable[..., Any], ask: Ask, denoise: Denoise
) -> None:
    request = ask(edit=None, width=96)
    assert torch.equal(denoise(engine, request).latents, stock_result(stock, request, engine))
    assert engine.start(request).inputs[0].references is None


def test_requests_with_and_without_a_picture_share_no_step(engine: Engine, ask: Ask) -> None:
    assert engine.start(ask(edit=None)).shape != engine.start(ask()).batch_key


def test_positions_of_a_picture_are_those_of_the_stock_pipeline(
    family: FluxKontextFamily, stock: FluxKontextPipeline
) -> None:
    noise_ids, picture_ids = (
        stock._prepare_latent_image_ids(1, *size, "cpu", torch.float32) for size in ((4, 6), (5, 3))
    )
    picture_ids[:, 0] = 1
    expected = stock.transformer.pos_embed(torch.cat((torch.zeros(7, 3), noise_ids, picture_ids)))
    for ours, theirs in zip(adapter.rotary_embedding(family.transformer, 7, 4, 6, [(5, 3)]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_defaults_are_those_of_the_model_card(tiny_flux_kontext: Path, tmp_path: Path) -> None:
    [card] = load_engine([tiny_flux_kontext], device="cpu", router_weights=tmp_path).cards.values()
    assert (card.default_num_inference_steps, card.default_guidance_scale) == (28, 2.5)
