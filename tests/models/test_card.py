"""A card's curve, as it holds for one request."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from models.card import Edits, ImageCard, ModelCard, PictureSizes, SizeLimits
from models.curve import EXACT, ComputedSteps, CurvePoint, Preset
from models.engine import Engine
from models.request import GenerationRequest
from models.rules.dense import DensePolicy
from models.rules.router import RouterPolicy
from tests.fixtures.generation import edit_of
from tests.fixtures.kinds import Kind

HIGH = CurvePoint(DensePolicy(), 0.5, 0.5, 0.9, 0.95, Preset.HIGH, ComputedSteps(10, 20))
DRAFT = CurvePoint(DensePolicy(), 0.2, 0.21, 0.7, 0.8, Preset.DRAFT, ComputedSteps(4, 20))
ROUTED = CurvePoint(RouterPolicy(0.5), 0.4, 0.5, 0.8, 0.9)


@pytest.fixture
def card(engine: Engine, model: str) -> ModelCard:
    return replace(engine.cards[model], curve=(EXACT, HIGH, ROUTED, DRAFT), default_num_inference_steps=20)


@pytest.fixture
def usual(kind: Kind, card: ModelCard, ask: Callable[..., GenerationRequest]) -> Callable[..., GenerationRequest]:
    """Build a request like those that the curve was measured on, but for some fields."""
    scale = card.default_guidance_scale
    fields: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": scale, "is_guided": card.is_guided(scale)}
    if isinstance(card, ImageCard):
        fields |= {"height": card.default_height, "width": card.default_width}
        if card.edits is Edits.REFERENCE:
            fields["edit"] = edit_of((50, 70))
    return lambda **others: ask(**{**fields, **others})


def test_curve_is_the_measured_one_for_usual_requests(card: ModelCard, usual: Callable[..., GenerationRequest]) -> None:
    assert card.curve_for(usual()) == card.curve


@pytest.mark.parametrize(("factor", "holds"), [(0.5, True), (2.0, True), (0.45, False), (2.2, False)])
def test_curve_holds_for_half_and_for_twice_the_guidance(
    card: ModelCard, usual: Callable[..., GenerationRequest], factor: float, holds: bool
) -> None:
    request = usual(guidance_scale=card.default_guidance_scale * factor)
    assert [point.is_calibrated for point in card.curve_for(request)] == [True, holds, holds, holds]


def test_one_more_step_is_computed_where_nothing_was_calibrated(
    card: ModelCard, usual: Callable[..., GenerationRequest]
) -> None:
    exact, routed, high, draft = card.curve_for(usual(num_inference_steps=40))
    assert exact == EXACT
    assert (high.steps, draft.steps) == (ComputedSteps(11, 40), ComputedSteps(5, 40))
    assert draft.compute_ratio == pytest.approx(5 / 40)
    assert draft.relative_seconds == pytest.approx(0.21 * 5 / 40 / (4 / 20))
    assert routed == replace(ROUTED, is_calibrated=False)
    assert [point.is_calibrated for point in (high, routed, draft)] == [False] * 3


@pytest.mark.parametrize("kind", ["flux", "qwen_image"], indirect=True, scope="session")
def test_edit_computes_the_steps_that_its_part_of_the_schedule_needs_and_one_more(
    card: ModelCard, usual: Callable[..., GenerationRequest], edited: Callable[..., dict[str, Any]]
) -> None:
    edit_steps = tuple(tuple(max(1, taken * computed // 20) for computed in range(1, 21)) for taken in range(1, 21))
    assert isinstance(card, ImageCard)
    card = replace(card, edit_steps=edit_steps)
    exact, high, routed, draft = card.curve_for(usual(**edited(0.5)))
    assert (high.steps, draft.steps) == (ComputedSteps(6, 10), ComputedSteps(3, 10))
    assert draft.compute_ratio == pytest.approx(3 / 10)
    assert [point.is_calibrated for point in (exact, high, routed, draft)] == [True, False, False, False]
    # 14 of 40 steps begin where 7 of 20 do.
    assert card.curve_for(usual(num_inference_steps=40, **edited(0.35)))[-1].steps == ComputedSteps(2, 14)
    assert card.curve_for(usual(**edited(1.0)))[1].steps == ComputedSteps(11, 20)


@pytest.mark.parametrize("kind", ["flux", "qwen_image"], indirect=True, scope="session")
def test_edit_computes_as_many_steps_as_a_generation_where_nothing_foretells_its_errors(
    card: ModelCard, usual: Callable[..., GenerationRequest], edited: Callable[..., dict[str, Any]]
) -> None:
    assert card.curve_for(usual(**edited(0.7)))[-1].steps == ComputedSteps(5, 14)


def test_guidance_that_was_not_calibrated_is_noticed(card: ModelCard, usual: Callable[..., GenerationRequest]) -> None:
    request = usual(is_guided=not usual().is_guided)
    assert not card.curve_for(request)[-1].is_calibrated


@pytest.mark.parametrize("kind", ["flux", "qwen_image"], indirect=True, scope="session")
def test_size_that_was_not_calibrated_is_noticed(card: ModelCard, usual: Callable[..., GenerationRequest]) -> None:
    assert not card.curve_for(usual(height=128))[-1].is_calibrated


def test_short_schedule_with_nothing_to_forecast_is_exact(
    card: ModelCard, usual: Callable[..., GenerationRequest]
) -> None:
    """And keeps its presets, so that asking for one is never an error."""
    curve = card.curve_for(usual(num_inference_steps=8))
    assert [point.is_exact for point in curve] == [True, True, False, False]
    assert [point.preset for point in curve] == [Preset.EXACT, Preset.HIGH, Preset.DRAFT, None]
    assert (curve[1].compute_ratio, curve[1].quality) == (1, 1)


@pytest.mark.parametrize("num_inference_steps", [2, 3, 4])
def test_even_the_shortest_schedule_can_meet_a_cap(
    card: ModelCard, usual: Callable[..., GenerationRequest], num_inference_steps: int
) -> None:
    curve = card.curve_for(usual(num_inference_steps=num_inference_steps))
    assert [point.compute_ratio for point in curve] == sorted((p.compute_ratio for p in curve), reverse=True)
    steps = [point.steps for point in curve if point.preset is Preset.DRAFT]
    assert steps == [ComputedSteps(num_inference_steps - 1, num_inference_steps)]


@pytest.mark.parametrize("kind", ["qwen_image_edit_plus"], indirect=True, scope="session")
def test_curve_of_a_model_for_editing_holds_for_one_picture(
    card: ModelCard, usual: Callable[..., GenerationRequest]
) -> None:
    for edit, holds in ((edit_of((50, 70)), True), (edit_of((50, 70), (50, 70)), False), (None, False)):
        assert card.curve_for(usual(edit=edit))[-1].is_calibrated is holds


@pytest.mark.parametrize("kind", ["flux_kontext"], indirect=True, scope="session")
@pytest.mark.parametrize(
    ("sizes", "limits", "picture", "expected"),
    [
        (PictureSizes(area=1024**2), SizeLimits(16, 64, 2048), (1000, 1000), (1024, 1024)),
        (PictureSizes(area=1024**2), SizeLimits(16, 64, 2048), (1920, 1080), (1376, 768)),
        (PictureSizes(area=1024**2), SizeLimits(16, 64, 2048), (100, 2000), (96, 2048)),
        (PictureSizes(area=1024**2), SizeLimits(16, 64, 512), (300, 100), (512, 160)),
        (PictureSizes(area=1024**2), SizeLimits(16, 64, 2048), (10, 1000), (64, 2048)),
        (
            PictureSizes(preferred=((672, 1568), (1024, 1024), (1568, 672))),
            SizeLimits(16, 64, 2048),
            (9, 16),
            (672, 1568),
        ),
    ],
)
def test_edit_without_a_size_has_that_of_its_picture(
    plain_engine: Engine,
    model: str,
    sizes: PictureSizes,
    limits: SizeLimits,
    picture: tuple[int, int],
    expected: tuple[int, int],
) -> None:
    card = plain_engine.cards[model]
    assert isinstance(card, ImageCard)
    assert replace(card, picture_sizes=sizes, sizes=limits).size_of_edit(*picture) == expected
