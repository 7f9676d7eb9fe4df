"""Edits of pictures: exactly those of diffusers' pipelines where they may change, the picture itself elsewhere."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageChops

from models.curve import EXACT, ComputedSteps, CurvePoint, Preset
from models.diffusion.sampling import add_noise
from models.engine import Engine
from models.errors import InvalidRequest
from models.families.image import ImageFamily
from models.request import ComputeBudget, ImageEdit, ImageRequest, PresetBudget, steps_of_strength
from models.rules.dense import DensePolicy
from models.state import DenoiseState
from models.zoo import load_engine
from tests.fixtures.generation import mask, open_image, picture, png_of
from tests.fixtures.kinds import Kind

Ask = Callable[..., ImageRequest]
Fields = Callable[..., dict[str, Any]]
Denoise = Callable[..., DenoiseState]
StockResult = Callable[..., Any]

ROOT = Path(__file__).parents[3]
FORECAST = CurvePoint(DensePolicy(), 0.5, 0.5, 0.5, 0.5, steps=ComputedSteps(3, 6))
WITH_AND_WITHOUT_MASK = pytest.mark.parametrize("has_mask", [False, True], ids=["image to image", "inpainting"])


@pytest.fixture(scope="session", params=["flux", "qwen_image"])
def kind(kind: Any) -> Any:
    """The families that edit pictures in this way."""
    return kind


def finished(engine: Engine, state: DenoiseState) -> NDArray[np.uint8]:
    pixels = engine.finish(state)
    assert isinstance(pixels, np.ndarray)
    return pixels


def may_change(request: ImageRequest) -> NDArray[np.bool_]:
    """Where the stock pipelines change pixels, `(height, width)`."""
    if request.edit is None or request.edit.mask is None:
        return np.full((request.height, request.width), True)
    processor = VaeImageProcessor(16, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    white = ImageChops.invert(open_image(request.edit.mask, "RGBA").getchannel("A"))
    changes: NDArray[np.bool_] = processor.preprocess(white, request.height, request.width)[0, 0].numpy() == 1
    return changes


def shown(request: ImageRequest) -> NDArray[np.uint8]:
    """The pixels of the picture, at the size of the request."""
    assert request.edit is not None
    size = (request.width, request.height)
    return np.asarray(open_image(request.edit.images[0]).resize(size, Image.Resampling.LANCZOS))


@pytest.mark.parametrize(
    ("strength", "fields"),
    [
        (0.5, {}),
        (1.0, {"seed": 3, "prompt": ""}),
        (0.3, {"height": 80, "width": 96}),
        (0.01, {"num_inference_steps": 3}),
    ],
)
@WITH_AND_WITHOUT_MASK
def test_exact_edit_equals_the_stock_pipelines_bit_for_bit(
    engine: Engine,
    stock: Any,
    stock_result: StockResult,
    ask: Ask,
    edited: Fields,
    denoise: Denoise,
    strength: float,
    fields: dict[str, Any],
    has_mask: bool,
) -> None:
    request = ask(**{"num_inference_steps": 6, **fields}, **edited(strength, 72, 88, has_mask=has_mask))
    state = denoise(engine, request)
    assert torch.equal(state.latents, stock_result(stock, request, engine))
    changes, expected = may_change(request), np.asarray(stock_result(stock, request, engine, "pil")[0])
    assert np.array_equal(finished(engine, state)[changes], expected[changes])
    assert changes.any()


@WITH_AND_WITHOUT_MASK
def test_exact_edit_equals_the_stock_pipelines_with_true_guidance(
    engine: Engine,
    stock: Any,
    stock_result: StockResult,
    ask: Ask,
    guided: Fields,
    edited: Fields,
    denoise: Denoise,
    has_mask: bool,
) -> None:
    """Up to rounding: two branches are two rows here and two calls there."""
    request = ask(width=80, **guided("", 3.0), **edited(0.7, has_mask=has_mask))
    state = denoise(engine, request)
    torch.testing.assert_close(state.latents, stock_result(stock, request, engine), rtol=0, atol=1e-5)
    expected = np.asarray(stock_result(stock, request, engine, "pil")[0])
    difference = np.abs(finished(engine, state).astype(int) - expected)
    assert difference[may_change(request)].max() <= 1


def test_exact_edit_by_the_shipped_model_equals_the_stock_pipelines(
    kind: Kind, edited: Fields, denoise: Denoise, stock_result: StockResult
) -> None:
    directory = ROOT / "checkpoints" / kind.model
    engine = load_engine([directory], device="cpu", router_weights=ROOT / "router_weights")
    card = engine.cards[kind.model]
    request = ImageRequest(
        model=kind.model,
        prompt="a large red ring in the centre",
        height=128,
        width=128,
        num_inference_steps=4,
        guidance_scale=card.default_guidance_scale,
        seed=7,
        budget=PresetBudget(Preset.EXACT),
        point=EXACT,
        is_guided=card.is_guided(card.default_guidance_scale),
        **edited(0.7, 128, 128, has_mask=True),
    )
    pixels, changes = finished(engine, denoise(engine, request)), may_change(request)
    expected = np.asarray(stock_result(kind.load_stock(directory), request, engine, "pil")[0])
    assert np.abs(pixels.astype(int) - expected)[changes].max() <= 1


@pytest.mark.parametrize("point", [EXACT, FORECAST], ids=["exact", "forecast"])
@pytest.mark.parametrize("size", [(64, 64), (80, 112)], ids=["as large", "resized"])
def test_nothing_outside_the_mask_changes_by_a_bit(
    engine: Engine, ask: Ask, edited: Fields, denoise: Denoise, point: CurvePoint, size: tuple[int, int]
) -> None:
    request = ask(num_inference_steps=6, **edited(1.0, *size, has_mask=True))
    pixels, changes = finished(engine, denoise(engine, request, point)), may_change(request)
    assert np.array_equal(pixels[~changes], shown(request)[~changes])
    assert (pixels[changes] != shown(request)[changes]).mean() > 0.9
    assert 0.1 < changes.mean() < 0.4


def test_pixel_may_change_where_the_mask_is_more_transparent_than_opaque() -> None:
    alpha = np.asarray(open_image(mask(64, 64), "RGBA"))[..., 3]
    assert {*np.unique(alpha)} == {0, 127, 128, 255}
    request: Any = type("R", (), {"edit": ImageEdit((), mask(64, 64)), "height": 64, "width": 64})
    assert np.array_equal(may_change(request), alpha < 128)


def test_mask_of_which_nothing_is_left_is_refused(engine: Engine, ask: Ask) -> None:
    dot, line = (np.full((side, side, 4), 255, np.uint8) for side in (640, 64))
    dot[300, 300, 3] = 0
    line[:, 25:32, 3] = 0  # between the pixels that speak for latents
    for file in (png_of(dot), png_of(line), png_of(np.zeros((64, 64, 3), np.uint8))):
        with pytest.raises(InvalidRequest, match="mask lets nothing change at 64x64, the size of the result") as error:
            engine.start(ask(edit=ImageEdit((picture(64, 64),), file, 1.0)))
        assert error.value.param == "mask"
    line[:, 24, 3] = 0
    assert engine.start(ask(edit=ImageEdit((picture(64, 64),), png_of(line), 1.0))).kept is not None


def test_what_is_transparent_in_a_picture_is_white(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    pixels = shown(ask(edit=ImageEdit((picture(64, 64),), None, 0.5)))
    clear = png_of(np.dstack((pixels, np.zeros((64, 64), np.uint8))))
    white = png_of(np.full((64, 64, 3), 255, np.uint8))
    edited = [denoise(engine, ask(edit=ImageEdit((file,), None, 0.5))).latents for file in (clear, white)]
    assert torch.equal(*edited)


def test_edit_depends_on_its_picture_its_mask_and_its_strength(
    engine: Engine, ask: Ask, edited: Fields, denoise: Denoise
) -> None:
    edits = [edited(), edited(seed=1), edited(0.9), edited(has_mask=True), {}]
    results = [denoise(engine, ask(**fields)).latents for fields in edits]
    assert len({result.sum().item() for result in results}) == len(edits)


# Steps


@given(num_inference_steps=st.integers(1, 100), strength=st.floats(1e-9, 1.0))
def test_steps_taken_are_those_of_the_stock_pipelines(
    family: ImageFamily, num_inference_steps: int, strength: float
) -> None:
    family.pipeline.scheduler.set_timesteps(num_inference_steps, mu=1.0)
    timesteps, num_steps = family._inpaint.get_timesteps(num_inference_steps, strength, "cpu")
    assert steps_of_strength(num_inference_steps, strength) == num_steps == len(timesteps)


@given(num_inference_steps=st.integers(1, 100))
def test_strength_that_takes_no_step_is_refused_with_one_that_does(num_inference_steps: int) -> None:
    with pytest.raises(
        InvalidRequest, match=f"strength 1e-18 takes none of the {num_inference_steps} denoise"
    ) as error:
        steps_of_strength(num_inference_steps, 1e-18)
    assert error.value.param == "strength"
    assert 1 <= steps_of_strength(num_inference_steps, float(str(error.value).rpartition("try ")[2])) <= 2


@pytest.mark.parametrize("point", [None, FORECAST], ids=["exact", "forecast"])
def test_only_steps_taken_are_charged_and_traced(
    engine: Engine, ask: Ask, edited: Fields, denoise: Denoise, point: CurvePoint | None
) -> None:
    request = ask(num_inference_steps=8, **edited(0.7))
    state = denoise(engine, request, point)
    summary, num_computed = state.summary(), 3 if point else 6
    assert request.num_steps == state.num_steps == 6
    assert summary.num_inference_steps == 8
    assert (summary.num_steps_computed, summary.num_steps_forecast) == (num_computed, 6 - num_computed)
    assert summary.compute_ratio == pytest.approx(num_computed / 6)
    assert state.spent_flops == pytest.approx(num_computed * state.dense_flops)
    assert {entry.step for entry in summary.decisions or ()} == {*range(6)}


@pytest.mark.parametrize(("cap", "num_computed"), [(0.5, 3), (0.34, 2), (0.17, 1)])
def test_compute_budget_is_a_share_of_the_steps_taken(
    engine: Engine, ask: Ask, edited: Fields, denoise: Denoise, cap: float, num_computed: int
) -> None:
    request = ask(num_inference_steps=8, budget=ComputeBudget(cap), point=FORECAST, **edited(0.7))
    assert request.num_computed_steps == num_computed
    summary = denoise(engine, request).summary()
    assert summary.num_steps_computed == num_computed
    assert summary.compute_ratio <= cap


def test_compute_budget_below_one_step_of_those_taken_is_refused(engine: Engine, ask: Ask, edited: Fields) -> None:
    with pytest.raises(InvalidRequest, match=r"compute_ratio 0.15 is not possible.*costs 0.1667; try 0.17"):
        engine.start(ask(num_inference_steps=8, budget=ComputeBudget(0.15), point=FORECAST, **edited(0.7)))


# The kept region


def test_forecast_moves_what_may_change_and_the_rest_follows_the_picture(
    engine: Engine, ask: Ask, edited: Fields
) -> None:
    """Each latent moves by itself. So one restoration after a gap equals one after each of its steps."""
    state = engine.start(ask(num_inference_steps=8, **edited(1.0, has_mask=True)), FORECAST)
    kept = state.kept
    assert kept is not None
    while not state.is_done:
        free = state.fork()
        free.kept = None
        engine.step([free])
        engine.step([state])
        assert torch.equal(state.latents[kept.changes], free.latents[kept.changes])
        picture_there = add_noise(kept.image_latents, kept.noise, state.sigmas[state.step_index])
        assert torch.equal(state.latents[~kept.changes], picture_there[~kept.changes])
        assert not torch.allclose(free.latents[~kept.changes], picture_there[~kept.changes], atol=0.01)
    assert len(state.computed) == 3


def test_edit_that_moves_along_the_curve_keeps_its_region(engine: Engine, ask: Ask, edited: Fields) -> None:
    """As a deadline moves it."""
    request = ask(num_inference_steps=8, **edited(1.0, has_mask=True))
    state = engine.start(request, FORECAST)
    for point in (EXACT, FORECAST, EXACT, FORECAST):
        state.move_to(point)
        engine.step([state])
    assert state.is_done
    assert state.num_forecast_steps > 0
    pixels, changes = finished(engine, state), may_change(request)
    assert np.array_equal(pixels[~changes], shown(request)[~changes])


def test_prediction_shows_the_picture_where_it_is_kept(engine: Engine, ask: Ask, edited: Fields) -> None:
    state = engine.start(ask(num_inference_steps=6, **edited(0.9, has_mask=True)))
    kept = state.kept
    assert kept is not None
    while not state.is_done:
        engine.step([state])
        assert state.prediction is not None
        assert torch.equal(state.prediction[~kept.changes], kept.image_latents[~kept.changes])
        on_the_way = add_noise(kept.image_latents, kept.noise, state.sigmas[state.step_index])
        assert torch.equal(state.latents[~kept.changes], on_the_way[~kept.changes])
    assert state.prediction is not None
    assert torch.equal(state.prediction, state.latents)


def test_fork_of_an_edit_keeps_the_same_region(engine: Engine, ask: Ask, edited: Fields, denoise: Denoise) -> None:
    request = ask(num_inference_steps=6, **edited(0.9, has_mask=True))
    state = engine.start(request)
    engine.step([state])
    fork = state.fork()
    while not fork.is_done:
        engine.step([fork])
    assert torch.equal(fork.latents, denoise(engine, request).latents)


def test_only_what_the_mask_needs_is_kept(engine: Engine, ask: Ask, edited: Fields) -> None:
    plain, masked = (engine.start(ask(**edited(has_mask=has_mask))) for has_mask in (False, True))
    assert plain.kept is None
    assert masked.kept is not None
    assert masked.kept.changes.dtype == torch.bool
    assert {*map(torch.Tensor.size, (masked.kept.changes, masked.kept.noise))} == {masked.latents.shape}


# Beside others


def test_edits_share_steps_with_generations_of_their_size(engine: Engine, ask: Ask, edited: Fields) -> None:
    requests = [ask(), ask(**edited()), ask(**edited(0.9, 96, 128, has_mask=True)), ask(width=80, **edited())]
    keys = [engine.start(request).shape for request in requests]
    assert keys[0] == keys[1] == keys[2] != keys[3]


def test_edit_can_start_while_another_result_is_decoded(
    engine: Engine, ask: Ask, edited: Fields, denoise: Denoise
) -> None:
    """One thread starts and another decodes; Qwen-Image's VAE has the state of what it computes on itself."""
    request = ask(**edited(has_mask=True))
    expected, pixels = engine.start(request).latents, finished(engine, done := denoise(engine, request))
    found = []

    def start(*_: object) -> None:
        thread = Thread(target=lambda: found.append(engine.start(request).latents))
        thread.start()
        thread.join()

    family: Any = engine._families[request.model]
    convolutions = [part for part in family.pipeline.vae.decoder.modules() if "Conv" in type(part).__name__]
    handle = convolutions[len(convolutions) // 2].register_forward_hook(start)
    try:
        assert np.array_equal(finished(engine, done), pixels)
    finally:
        handle.remove()
    assert [torch.equal(latents, expected) for latents in found] == [True]
