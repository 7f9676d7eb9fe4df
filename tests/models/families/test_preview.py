"""Previews show where a request is going, and cost it nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from numpy.typing import NDArray
from torch.nn import functional as F

from models.curve import EXACT, CurvePoint, Preset
from models.engine import Engine
from models.errors import EmptySurface
from models.families.preview import apply_colour_map, fit_colour_map, fitting_images
from models.load_options import DEFAULTS
from models.mesh.cleanup import CleanMesh
from models.mesh.surface import BOUNDS
from models.request import GenerationRequest, ImageRequest, MeshRequest, PresetBudget
from models.rules.router import RouterPolicy
from models.state import DenoiseState
from models.weights import CheckpointTraits
from models.zoo import load_engine

Ask = Callable[..., GenerationRequest]
Guided = Callable[..., dict[str, Any]]
Denoise = Callable[..., DenoiseState]
Result = NDArray[np.uint8] | CleanMesh

ROOT = Path(__file__).parents[3]
ROUTED = CurvePoint(RouterPolicy(0.3, 0.3, 2, width_bias=0.5), 0.5, 0.5, 0.5, 0.5)

only_images = pytest.mark.parametrize("kind", ["flux", "qwen_image"], indirect=True, scope="session")
only_meshes = pytest.mark.parametrize("kind", ["hunyuan3d_plain", "hunyuan3d_stream"], indirect=True, scope="session")


def assert_same(a: Result, b: Result) -> None:
    if isinstance(a, CleanMesh) and isinstance(b, CleanMesh):
        assert np.array_equal(a.mesh.vertices, b.mesh.vertices)
        assert np.array_equal(a.mesh.faces, b.mesh.faces)
    else:
        assert isinstance(a, np.ndarray)
        assert isinstance(b, np.ndarray)
        assert np.array_equal(a, b)


def shipped_engine(model: str) -> Engine:
    return load_engine([ROOT / "checkpoints" / model], device="cpu", router_weights=ROOT / "router_weights")


def test_previews_do_not_change_the_result(engine: Engine, ask: Ask, guided: Guided, denoise: Denoise) -> None:
    request = ask(**guided())
    plain, watched = denoise(engine, request, ROUTED), engine.start(request, ROUTED)
    while not watched.is_done:
        engine.step([watched])
        engine.preview(watched)()
    assert torch.equal(watched.latents, plain.latents)
    assert watched.summary() == plain.summary()
    assert_same(engine.finish(watched), engine.finish(plain))


def test_preview_is_of_the_state_as_it_was(engine: Engine, ask: Ask) -> None:
    state = engine.start(ask())
    engine.step([state])
    early = engine.preview(state)
    expected = early()
    while not state.is_done:
        engine.step([state])
    assert_same(early(), expected)
    with pytest.raises(AssertionError):
        assert_same(engine.preview(state)(), expected)


def test_prediction_is_where_the_guided_velocity_leads(engine: Engine, ask: Ask, guided: Guided) -> None:
    state = engine.start(ask(**guided()))
    while not state.is_done:
        before, (sigma, next_sigma) = state.latents, state.sigmas[state.step_index :][:2]
        engine.step([state])
        velocity = (state.latents - before) / (next_sigma - sigma)
        assert state.prediction is not None
        torch.testing.assert_close(state.prediction, before + (state.sigmas[-1] - sigma) * velocity)
    assert state.prediction is not None
    assert torch.equal(state.prediction, state.latents)


@only_images
def test_preview_of_an_image_has_a_pixel_for_each_of_the_latents(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    preview = engine.preview(denoise(engine, ask(height=64, width=96)))()
    assert isinstance(preview, np.ndarray)
    assert preview.shape == (8, 12, 3)
    assert preview.dtype == np.uint8


@only_images
def test_colours_hardly_differ_in_bfloat16(
    kind: Any, directory: Path, engine: Engine, ask: Ask, denoise: Denoise
) -> None:
    family = kind.family.load(directory, "cpu", torch.bfloat16, None, CheckpointTraits(), DEFAULTS)
    state = denoise(engine, ask())
    assert state.prediction is not None
    expected, preview = engine.preview(state)(), family.preview(state.request, state.prediction.bfloat16())
    # Untrained decoders make harsh images: wrong ones would differ by some 80. How far these do depends on the CPU.
    assert np.abs(preview.astype(float) - expected).mean() < 8


@only_meshes
def test_last_preview_of_a_mesh_is_the_result_on_a_coarse_grid(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    request = ask()
    assert isinstance(request, MeshRequest)
    state = denoise(engine, replace(request, octree_resolution=32))
    assert_same(engine.preview(state)(), engine.finish(state))


@only_meshes
def test_preview_without_a_surface_says_so(engine: Engine, ask: Ask) -> None:
    state = engine.start(ask())
    engine.step([state])
    state.prediction = torch.full_like(state.latents, torch.nan)
    with pytest.raises(EmptySurface):
        engine.preview(state)()


def test_map_is_fitted_to_the_mean_colours_of_latent_pixels() -> None:
    images = fitting_images()
    red, green, blue = F.avg_pool2d(images, 8).unbind(1)
    latents = torch.stack([2 * red, green - blue, 0.5 - blue, red * green], dim=1)
    expected = ((F.avg_pool2d(images[0], 8).movedim(0, -1) + 1) * 127.5).round()
    preview = apply_colour_map(fit_colour_map(latents, images), latents[0])
    assert np.abs(preview.astype(float) - expected.numpy()).max() <= 1


def test_images_to_fit_to_are_always_the_same_and_of_all_colours() -> None:
    images = fitting_images()
    assert torch.equal(images, fitting_images())
    assert images.abs().max() == 1
    octants = (images.movedim(1, -1).flatten(0, 2) > 0).int() @ torch.tensor([4, 2, 1], dtype=torch.int32)
    assert (octants.bincount() > 0.05 * len(octants)).all()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-flux", "tiny-qwen-image"])
def test_previews_of_a_trained_model_look_ever_more_like_its_image(model: str) -> None:
    """Correlations seen after steps 1, 3 and 6: 0.86, 0.95 and 0.98 for FLUX, 0.79, 0.92 and 0.98 for Qwen-Image."""
    engine = shipped_engine(model)
    request = ImageRequest(
        model=model,
        prompt="a large purple cross at the top left, a small cyan circle at the top right, "
        "a large white ring at the bottom left, on a striped grey background",
        height=128,
        width=128,
        num_inference_steps=6,
        guidance_scale=3.0,
        seed=7,
        budget=PresetBudget(Preset.EXACT),
        point=EXACT,
        is_guided=model == "tiny-qwen-image",
    )
    state = engine.start(request)
    previews = []
    while not state.is_done:
        engine.step([state])
        preview = engine.preview(state)()
        assert isinstance(preview, np.ndarray)
        previews.append(preview)
    pixels = engine.finish(state)
    assert isinstance(pixels, np.ndarray)
    downsampled = pixels.reshape(16, 8, 16, 8, 3).mean((1, 3))
    first, middle, last = (np.corrcoef(previews[i].ravel(), downsampled.ravel())[0, 1] for i in (0, 2, 5))
    assert 0.7 < first < middle < last
    assert last > 0.95


@pytest.mark.slow
def test_last_preview_of_a_trained_model_has_the_form_of_its_mesh() -> None:
    """Seen: bounds within 0.07 of the preview's cells, and 0.995 of the volume."""
    engine = shipped_engine("tiny-hunyuan3d")
    request = MeshRequest(
        model="tiny-hunyuan3d",
        num_inference_steps=6,
        guidance_scale=2.0,
        seed=7,
        budget=PresetBudget(Preset.EXACT),
        point=EXACT,
        is_guided=True,
        input_image=(ROOT / "docs/images/solid.png").read_bytes(),
        octree_resolution=64,
    )
    state = engine.start(request)
    while not state.is_done:
        engine.step([state])
    preview, result = (
        trimesh.Trimesh(made.mesh.vertices, made.mesh.faces)
        for made in (engine.preview(state)(), engine.finish(state))
        if isinstance(made, CleanMesh)
    )
    cell = 2 * BOUNDS / 32
    np.testing.assert_allclose(preview.bounds, result.bounds, atol=cell / 2)
    assert preview.volume == pytest.approx(result.volume, rel=0.05)
