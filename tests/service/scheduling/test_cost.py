from collections.abc import Callable
from dataclasses import replace

import pytest

from models.card import DecodeSpeed, ImageCard, MeshCard, PictureSizes
from models.curve import Preset
from models.request import Budget, ComputeBudget, ImageEdit, ImageRequest, LatencyBudget, PresetBudget
from service.jobs.job import Job
from service.scheduling.cost import (
    block_seconds,
    dense_step_seconds,
    grid_bytes,
    mesh_decode_seconds,
    predicted_seconds,
)
from tests.fixtures.generation import edit_of

EXACT = PresetBudget(Preset.EXACT)


@pytest.fixture
def drawn_card(drawn_card: ImageCard) -> ImageCard:
    """One whose steps take time in proportion to their work."""
    return replace(drawn_card, fixed_share=0.0)


@pytest.fixture
def guided_card(guided_card: ImageCard) -> ImageCard:
    return replace(guided_card, fixed_share=0.0)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"budget": EXACT}, 2.0),
        ({"budget": EXACT, "num_inference_steps": 8}, 4.0),
        ({"budget": EXACT, "height": 128, "width": 128}, 8.0),
        ({"budget": EXACT, "negative_prompt": "", "true_cfg_scale": 4.0}, 4.0),
        ({"budget": EXACT, "guidance_scale": 1.0}, 2.0),
        ({"budget": PresetBudget(Preset.FAST)}, 1.1),
    ],
)
def test_cost_grows_with_steps_pixels_branches_and_budget(
    fields: dict[str, object], seconds: float, make_request: Callable[..., ImageRequest], drawn_card: ImageCard
) -> None:
    assert predicted_seconds(make_request(**fields), drawn_card) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"budget": EXACT}, 4.0),
        ({"budget": PresetBudget(Preset.DRAFT)}, 1.0),
        ({"budget": PresetBudget(Preset.DRAFT), "num_inference_steps": 16}, 1.5),
        ({"budget": PresetBudget(Preset.BALANCED), "num_inference_steps": 4}, 2.0),
        ({"budget": ComputeBudget(0.125)}, 0.5),
        ({"budget": ComputeBudget(0.01)}, 0.5),
    ],
)
def test_only_computed_steps_cost_time(
    fields: dict[str, object], seconds: float, make_request: Callable[..., ImageRequest], forecasting_card: ImageCard
) -> None:
    request = make_request(card=forecasting_card, **fields)
    assert predicted_seconds(request, forecasting_card) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("budget", "strength", "seconds"),
    [
        (EXACT, 1.0, 4.0),
        (EXACT, 0.5, 2.0),
        (EXACT, 0.01, 0.5),
        (PresetBudget(Preset.BALANCED), 0.75, 2.0),
        (ComputeBudget(0.34), 0.75, 1.0),
    ],
)
def test_edit_costs_the_steps_that_its_strength_takes(
    budget: Budget,
    strength: float,
    seconds: float,
    make_request: Callable[..., ImageRequest],
    forecasting_card: ImageCard,
) -> None:
    request = make_request(card=forecasting_card, budget=budget, edit=ImageEdit((b"",), None, strength))
    assert predicted_seconds(request, forecasting_card) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [({}, 0.1 + 2.0 + 0.2), ({"height": 128}, 0.1 + 4.0 + 0.4), ({"num_inference_steps": 8}, 0.1 + 4.0 + 0.2)],
)
def test_cost_of_encoding_is_fixed_and_cost_of_decoding_grows_with_pixels(
    fields: dict[str, object], seconds: float, make_request: Callable[..., ImageRequest], drawn_card: ImageCard
) -> None:
    card = replace(drawn_card, encode_seconds=0.1, decode_seconds=0.2)
    assert predicted_seconds(make_request(budget=EXACT, **fields), card) == pytest.approx(seconds)


def test_picture_to_edit_costs_time_by_its_size(
    make_request: Callable[..., ImageRequest], drawn_card: ImageCard
) -> None:
    card, edit = replace(drawn_card, encode_seconds=0.1, picture_seconds=0.3), ImageEdit((b"",), None, 1.0)
    small, large = (make_request(budget=EXACT, height=height, edit=edit) for height in (64, 128))
    assert predicted_seconds(small, card) == pytest.approx(0.1 + 0.3 + 2.0)
    assert predicted_seconds(large, card) == pytest.approx(0.1 + 0.6 + 4.0)
    assert predicted_seconds(replace(small, edit=None), card) == pytest.approx(0.1 + 2.0)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, 0.5),
        ({"height": 128, "width": 128}, 0.2 + 4 * 0.3),
        ({"height": 32}, 0.2 + 0.3 / 2),
        ({"negative_prompt": "", "true_cfg_scale": 4.0}, 0.2 + 2 * 0.3),
    ],
)
def test_only_rows_cost_more_where_there_is_more_to_do(
    fields: dict[str, object], seconds: float, make_request: Callable[..., ImageRequest], drawn_card: ImageCard
) -> None:
    card = replace(drawn_card, fixed_share=0.4)
    request = make_request(**fields)
    assert dense_step_seconds(request, card) == pytest.approx(seconds)
    assert block_seconds(request, card).call == pytest.approx(0.2 / len(card.blocks))


@pytest.mark.parametrize(
    ("default_guidance_scale", "guidance_scale", "seconds"),
    [(3.5, 3.5, 2.0), (3.5, 1.1, 2.0), (3.5, 1.0, 1.0), (3.5, 0.0, 1.0), (1.0, 1.0, 2.0), (1.0, 2.0, 4.0)],
)
def test_cost_of_true_guidance_is_relative_to_the_default_guidance(
    default_guidance_scale: float,
    guidance_scale: float,
    seconds: float,
    make_request: Callable[..., ImageRequest],
    guided_card: ImageCard,
) -> None:
    card = replace(guided_card, default_guidance_scale=default_guidance_scale)
    request = make_request(card=card, budget=EXACT, guidance_scale=guidance_scale)
    assert predicted_seconds(request, card) == pytest.approx(seconds)


def test_decoding_a_mesh_costs_time_and_memory_by_its_resolution(
    mesh_card: MeshCard, make_mesh_job: Callable[..., Job]
) -> None:
    card = replace(mesh_card, decode_speed=DecodeSpeed(field_point=1e-6, grid_point=1e-8, face=1e-5))
    coarse, fine = (make_mesh_job("mesh", octree_resolution=cells).requests[0] for cells in (32, 512))
    denoise_s = 4 * card.dense_step_seconds
    assert mesh_decode_seconds(coarse, card) == pytest.approx(
        33**3 * 1e-6 + 33**3 * 1e-8 + 4.2 * 32**2 * 1e-5, rel=0.01
    )
    points = 65**3 + 6 * (128**2 + 256**2 + 512**2)
    assert mesh_decode_seconds(fine, card) == pytest.approx(
        points * 1e-6 + 513**3 * 1e-8 + 4.2 * 512**2 * 1e-5, rel=0.01
    )
    for request in (coarse, fine):
        assert predicted_seconds(request, card) == pytest.approx(denoise_s + mesh_decode_seconds(request, card))
    assert grid_bytes(fine) == pytest.approx(16**3 * grid_bytes(coarse), rel=0.1)


def test_an_image_has_no_mesh_to_decode(make_request: Callable[..., ImageRequest], drawn_card: ImageCard) -> None:
    assert (mesh_decode_seconds(make_request(), drawn_card), grid_bytes(make_request())) == (0, 0)


@pytest.mark.parametrize(("num_pictures", "side", "seconds"), [(1, 64, 1.0), (2, 64, 1.5), (0, 64, 0.5), (3, 128, 3.5)])
def test_step_takes_longer_with_pictures_beside_the_noise(
    make_request: Callable[..., ImageRequest], drawn_card: ImageCard, num_pictures: int, side: int, seconds: float
) -> None:
    """The step that was measured had one, here as large as the image."""
    card = replace(drawn_card, picture_sizes=PictureSizes(area=64 * 64), dense_step_seconds=1.0)
    edit = edit_of(*[(50, 70)] * num_pictures) if num_pictures else None
    request = make_request(edit=edit, height=side, width=side)
    assert dense_step_seconds(request, card) == pytest.approx(seconds)


@pytest.mark.parametrize(("joins_branches", "num_calls"), [(True, 1), (False, 2)])
def test_exact_step_with_guidance_pays_for_as_many_calls_as_its_publishers(
    joins_branches: bool, num_calls: int, make_request: Callable[..., ImageRequest], drawn_card: ImageCard
) -> None:
    card = replace(drawn_card, fixed_share=0.25, joins_branches=joins_branches)
    guided = {"negative_prompt": "", "true_cfg_scale": 4.0}
    alone = block_seconds(make_request(budget=EXACT), card).call
    assert block_seconds(make_request(budget=EXACT, **guided), card).call == pytest.approx(num_calls * alone)
    for shared in (PresetBudget(Preset.FAST), LatencyBudget(9.0)):
        assert block_seconds(make_request(budget=shared, **guided), card).call == pytest.approx(alone)
