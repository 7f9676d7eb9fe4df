from collections.abc import Callable
from dataclasses import replace

import pytest

from models.card import ImageCard
from models.curve import Preset
from models.request import ComputeBudget, ImageRequest, LatencyBudget, PresetBudget
from service.scheduling.cost import block_seconds, dense_step_seconds, predicted_seconds

EXACT = PresetBudget(Preset.EXACT)


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
        ({"budget": LatencyBudget(3.0)}, 2.0),
    ],
)
def test_only_computed_steps_cost_time(
    fields: dict[str, object], seconds: float, make_request: Callable[..., ImageRequest], forecasting_card: ImageCard
) -> None:
    request = make_request(card=forecasting_card, **fields)
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
