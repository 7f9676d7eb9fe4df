"""What this family does beside what all families do: schedules, two forms of guidance, long skips, meshes."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.card import Guidance, MeshCard
from models.curve import EXACT, CurvePoint
from models.engine import Engine
from models.errors import InvalidRequest
from models.families.hunyuan3d.pipeline import Hunyuan3DFamily
from models.file_formats import MeshFormat
from models.load_options import DEFAULTS
from models.mesh.cleanup import CleanMesh, clean
from models.mesh.file import make_mesh_file
from models.mesh.formats import encode_mesh
from models.mesh.size import MIN_COARSE_CELLS
from models.mesh.surface import extract_surface
from models.mesh.volume import decode_dense, finished
from models.request import LatencyBudget, MeshRequest
from models.rules.router import RouterPolicy
from models.state import DenoiseState
from models.weights import CheckpointTraits
from models.zoo import load_engine

Ask = Callable[..., MeshRequest]
Denoise = Callable[..., DenoiseState]

ALL_SKIPPED = CurvePoint(RouterPolicy(skip_threshold=1.1), 0.0, 0.0, 0.0, 0.0)


@pytest.fixture(scope="session", params=["hunyuan3d_plain", "hunyuan3d_stream"])
def kind(kind: Any) -> Any:
    """Both denoisers."""
    return kind


only_plain = pytest.mark.parametrize("kind", ["hunyuan3d_plain"], indirect=True, scope="session")


@pytest.fixture
def undistilled(directory: Path, tmp_path: Path) -> Path:
    """The model with the schedule of the public base models."""
    folder = Path(shutil.copytree(directory, tmp_path / "tiny-hunyuan3d"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["scheduler"] = {"target": "x.FlowMatchEulerDiscreteScheduler", "params": {"num_train_timesteps": 1000}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_exact_equals_the_published_sampling_whose_last_step_has_no_length(
    kind: Any, undistilled: Path, tmp_path: Path, ask: Ask, denoise: Denoise, guidance_scale: float, steps: int
) -> None:
    engine = load_engine([undistilled], device="cpu", router_weights=tmp_path)
    request = ask(num_inference_steps=steps, guidance_scale=guidance_scale)
    state = denoise(engine, request)
    assert state.num_steps == max(steps - 1, 1)
    assert state.summary().num_inference_steps == steps
    assert torch.equal(state.latents, kind.load_stock(undistilled).latents(request))


def test_defaults_are_the_published_ones_unless_a_manifest_has_others(
    directory: Path, undistilled: Path, engine: Engine, model: str, tmp_path: Path
) -> None:
    base = load_engine([undistilled], device="cpu", router_weights=tmp_path).cards[model]
    turbo = load_engine([directory], device="cpu", router_weights=tmp_path).cards[model]
    for card, steps in ((base, 50), (turbo, 5)):
        assert isinstance(card, MeshCard)
        assert (card.default_num_inference_steps, card.default_guidance_scale) == (steps, 5.0)
        assert (card.default_octree_resolution, card.guidance) == (384, Guidance.TRUE)
    card = engine.cards[model]
    assert isinstance(card, MeshCard)
    assert card.default_octree_resolution == 16


def test_resolutions_of_the_card_can_be_halved_to_the_coarsest_grid(engine: Engine, model: str) -> None:
    card = engine.cards[model]
    assert isinstance(card, MeshCard)
    for resolution in range(card.min_octree_resolution, card.max_octree_resolution + 1, card.octree_resolution_step):
        strides = [2**power for power in range(9) if resolution / 2**power >= MIN_COARSE_CELLS] or [1]
        assert resolution % strides[-1] == 0


@pytest.mark.parametrize("kind", ["hunyuan3d_stream"], indirect=True, scope="session")
def test_guidance_that_is_distilled_into_the_denoiser_is_an_input_of_it(
    kind: Any, directory: Path, tmp_path: Path, ask: Ask, denoise: Denoise
) -> None:
    folder = Path(shutil.copytree(directory, tmp_path / "tiny-hunyuan3d"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["params"]["guidance_embed"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    tensors = load_file(folder / "model.safetensors")
    embedder = {name: tensor for name, tensor in tensors.items() if name.startswith("model.time_in.")}
    tensors |= {name.replace("time_in", "guidance_in"): tensor.flip(0) for name, tensor in embedder.items()}
    save_file(tensors, folder / "model.safetensors")
    engine = load_engine([folder], device="cpu", router_weights=tmp_path)
    assert engine.cards["tiny-hunyuan3d"].guidance is Guidance.DISTILLED
    denoiser = kind.load_stock(folder).transformer
    results = []
    for scale in (1.0, 4.0):
        request = ask(num_inference_steps=1, guidance_scale=scale)
        state = engine.start(request)
        assert [row.branch for row in state.rows] == ["cond"]
        noise, times, context = state.latents, state.timesteps, state.inputs[0].context
        engine.step([state])
        velocity = denoiser(noise, times, context, torch.tensor([scale]))
        assert torch.equal(state.latents, noise + velocity)
        results.append(state.latents)
    assert not torch.allclose(results[0], results[1], atol=0.01)


@only_plain
def test_skipped_blocks_still_mix_in_what_earlier_ones_left(engine: Engine, stock: Any, ask: Ask) -> None:
    state = engine.start(ask(num_inference_steps=1), ALL_SKIPPED)
    noise, times, context = state.latents, state.timesteps, state.inputs[0].context
    engine.step([state])
    blocks = set(range(len(stock.transformer.blocks)))
    assert torch.equal(state.latents, noise + stock.transformer(noise, times, context, left_out=blocks))


@only_plain
def test_rows_without_an_image_take_the_shortcut_and_give_the_same(
    engine: Engine, family: Hunyuan3DFamily, stock: Any, ask: Ask, denoise: Denoise
) -> None:
    """Where they need not be exact: the published program attends to the zeros."""
    seen: list[tuple[int, int, list[int] | None]] = []

    def note(_module: nn.Module, _args: tuple[()], kwargs: dict[str, Tensor | None]) -> None:
        hidden_states, context, rows = (kwargs[name] for name in ("hidden_states", "context", "context_rows"))
        assert hidden_states is not None
        assert context is not None
        seen.append((len(hidden_states), len(context), None if rows is None else rows.tolist()))

    watched = Engine({family.model_id: family}, engine.cards)
    request = ask(guidance_scale=5.0, budget=LatencyBudget(60.0))
    handle = family.blocks[0].variants[1.0].register_forward_pre_hook(note, with_kwargs=True)
    state, exact = denoise(watched, request), denoise(watched, ask(guidance_scale=5.0))
    handle.remove()
    assert seen == [(2, 1, [0])] * 4 + [(2, 2, None)] * 4
    assert torch.equal(exact.latents, stock.latents(request))
    torch.testing.assert_close(state.latents, stock.latents(request), rtol=0, atol=1e-5)
    cond, uncond = (row.costs["block.00"].dense for row in state.rows)
    assert uncond < 0.9 * cond
    assert state.summary().compute_ratio == 1


@only_plain
def test_companions_do_not_matter_where_some_rows_take_the_shortcut(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    routed = CurvePoint(RouterPolicy(0.3, 0.3, 2, width_bias=0.5), 0.5, 0.5, 0.5, 0.5)
    requests = [
        (ask(seed=i, guidance_scale=scale), point)
        for i, scale, point in zip(count(), (1.0, 5.0, 3.0, 2.0), (routed, routed, EXACT, routed), strict=False)
    ]
    alone = [denoise(engine, request, point) for request, point in requests]
    together = [engine.start(request, point) for request, point in requests]
    while present := [state for state in together if not state.is_done]:
        engine.step(present)
    for ours, expected in zip(together, alone, strict=True):
        assert ours.summary().decisions == expected.summary().decisions
        torch.testing.assert_close(ours.latents, expected.latents, rtol=0, atol=1e-4)


def test_result_is_the_cleaned_surface_of_the_dense_field(
    engine: Engine, stock: Any, ask: Ask, denoise: Denoise
) -> None:
    request = replace(ask(), octree_resolution=32)
    state = denoise(engine, request)
    result = engine.finish(state)
    assert isinstance(result, CleanMesh)
    field = stock.vae.field(state.latents / stock.vae.scale_factor)
    grid_logits = decode_dense(field, 32, points_per_call=9999, device=torch.device("cpu"))
    expected = clean(extract_surface(grid_logits.numpy()))
    np.testing.assert_allclose(result.mesh.vertices, expected.mesh.vertices, atol=1e-4)
    assert result.report == expected.report


@pytest.mark.parametrize("target_faces", [None, 2000])
def test_decoding_in_turns_gives_the_same_file(
    engine: Engine, ask: Ask, denoise: Denoise, target_faces: int | None
) -> None:
    state = denoise(engine, replace(ask(), octree_resolution=48, target_faces=target_faces))
    at_once, turns = engine.finish(state), engine.decode_in_turns(state)
    assert isinstance(at_once, CleanMesh)
    assert turns is not None
    file = make_mesh_file(finished(turns), target_faces, MeshFormat.OBJ)
    assert (file.data, file.report) == (encode_mesh(at_once.mesh, MeshFormat.OBJ), at_once.report)


def test_preparation_changes_nothing(engine: Engine, ask: Ask) -> None:
    request = ask()
    preparation = engine.preparation(request)
    assert preparation is not None
    prepared = preparation()
    assert isinstance(prepared, MeshRequest)
    assert prepared.is_prepared
    direct, in_two_parts = engine.start(request), engine.start(prepared)
    assert torch.equal(direct.inputs[0].context, in_two_parts.inputs[0].context)


def test_seconds_of_decoding_are_predicted_from_the_resolution(engine: Engine, model: str) -> None:
    card = engine.cards[model]
    assert isinstance(card, MeshCard)
    speed = card.decode_speed
    assert min(speed.field_point, speed.grid_point, speed.face) > 0
    assert card.decode_seconds(512) > 4 * card.decode_seconds(128) > 0


def test_reduced_mesh_has_no_more_faces_than_asked_for(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    state = denoise(engine, replace(ask(), octree_resolution=48, target_faces=2000))
    result = engine.finish(state)
    assert isinstance(result, CleanMesh)
    assert 100 < result.report.num_faces <= 2000


def test_similarity_is_the_share_of_the_volume_that_two_shapes_have_in_common(
    engine: Engine, model: str, ask: Ask, denoise: Denoise
) -> None:
    a, b = (engine.quality_sample(denoise(engine, ask(seed=seed))) for seed in (0, 1))
    assert a.dtype == bool
    assert 0 < a.mean() < 1
    assert engine.similarity(model, a, a) == 1
    assert engine.similarity(model, a, b) == pytest.approx((a & b).sum() / (a | b).sum())
    assert engine.similarity(model, a & ~a, b & ~b) == 1


def test_latents_stay_in_float32_where_the_denoiser_is_in_bfloat16(
    directory: Path, engine: Engine, ask: Ask, denoise: Denoise
) -> None:
    family = Hunyuan3DFamily.load(directory, "cpu", torch.bfloat16, None, CheckpointTraits(), DEFAULTS)
    half = Engine({family.model_id: family}, engine.cards)
    state = denoise(half, ask(guidance_scale=2.0))
    assert {p.dtype for p in family.transformer.parameters()} == {torch.bfloat16}
    assert state.latents.dtype == torch.float32
    expected = denoise(engine, ask(guidance_scale=2.0)).latents
    assert (state.latents - expected).norm() < 0.2 * expected.norm()
    assert isinstance(half.finish(state), CleanMesh)


def test_image_that_shows_nothing_is_refused_by_its_field(engine: Engine, ask: Ask) -> None:
    file = BytesIO()
    Image.new("RGBA", (40, 40)).save(file, "PNG")
    with pytest.raises(InvalidRequest, match="fully transparent") as caught:
        engine.start(replace(ask(), input_image=file.getvalue()))
    assert caught.value.param == "input_image"


def test_images_differ_and_the_same_image_gives_the_same(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    one, same, other = (denoise(engine, ask(prompt=prompt)).latents for prompt in ("a", "a", "b"))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=0.01)
