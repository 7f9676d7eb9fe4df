from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.budget import resolve
from models.curve import EXACT, ComputedSteps, CurvePoint, Preset
from models.errors import InvalidRequest
from models.request import Budget, ComputeBudget, PresetBudget, QualityBudget
from models.rules.dense import DensePolicy
from models.rules.router import RouterPolicy

ROUNDING = 1e-9
HIGH = CurvePoint(RouterPolicy(skip_threshold=0.2, max_reuses=2), 0.8, 0.9, 0.96, 0.96, Preset.HIGH)
FAST = CurvePoint(RouterPolicy(skip_threshold=0.6, max_reuses=5), 0.4, 0.5, 0.8, 0.8, Preset.FAST)
CURVE = (EXACT, HIGH, FAST)

shares = st.floats(0.01, 0.99)


@st.composite
def curves(draw: st.DrawFn) -> list[CurvePoint]:
    """A curve as calibration writes them: exact first, then one rule's points, descending in compute and quality."""
    length = draw(st.integers(1, 6))
    compute, quality = (
        sorted(draw(st.lists(shares, min_size=length, max_size=length, unique=True)), reverse=True) for _ in range(2)
    )
    thresholds = sorted(draw(st.lists(shares, min_size=length, max_size=length)))
    return [
        EXACT,
        *(
            CurvePoint(RouterPolicy(skip_threshold=threshold), ratio, ratio, similarity, similarity)
            for threshold, ratio, similarity in zip(thresholds, compute, quality, strict=True)
        ),
    ]


@given(curves(), st.lists(st.floats(0.001, 1), min_size=2, max_size=6))
def test_more_compute_never_gives_less(curve: list[CurvePoint], wanted: list[float]) -> None:
    answers = [resolve(ComputeBudget(ratio), curve) for ratio in sorted(wanted)]
    for lower, upper in pairwise(answers):
        assert lower.compute_ratio <= upper.compute_ratio + ROUNDING
        assert lower.quality <= upper.quality + ROUNDING
        assert lower.policy.skip_threshold >= upper.policy.skip_threshold - ROUNDING


@given(curves(), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_more_quality_never_gives_less(curve: list[CurvePoint], wanted: list[float]) -> None:
    answers = [resolve(QualityBudget(quality), curve) for quality in sorted(wanted)]
    for lower, upper in pairwise(answers):
        assert lower.compute_ratio <= upper.compute_ratio + ROUNDING
        assert lower.quality <= upper.quality + ROUNDING


@given(curves(), st.floats(0.001, 1))
def test_predicted_compute_is_under_the_cap_or_the_lowest_there_is(curve: list[CurvePoint], cap: float) -> None:
    answer = resolve(ComputeBudget(cap), curve)
    assert answer.compute_ratio <= cap + ROUNDING or answer == curve[-1]


@given(curves(), st.floats(0, 1))
def test_predicted_quality_is_at_the_floor_or_above(curve: list[CurvePoint], floor: float) -> None:
    answer = resolve(QualityBudget(floor), curve)
    assert answer.quality >= floor - ROUNDING
    # Nor is it better than asked for, where the curve goes on below.
    assert answer.quality <= max(floor, curve[-1].quality) + ROUNDING or answer == EXACT


@given(curves(), st.floats(0.001, 1))
def test_answer_lies_between_the_measured_points(curve: list[CurvePoint], cap: float) -> None:
    answer = resolve(ComputeBudget(cap), curve)
    assert curve[-1].compute_ratio <= answer.compute_ratio <= 1
    assert curve[-1].quality <= answer.quality + ROUNDING


@pytest.mark.parametrize("point", CURVE)
def test_measured_point_is_given_as_it_was_measured(point: CurvePoint) -> None:
    assert resolve(ComputeBudget(point.compute_ratio), CURVE) == point
    assert resolve(QualityBudget(point.quality), CURVE) == point
    assert point.preset is not None
    assert resolve(PresetBudget(point.preset), CURVE) == point


@pytest.mark.parametrize("budget", [ComputeBudget(1.0), QualityBudget(1.0), PresetBudget(Preset.EXACT)])
def test_everything_asked_for_is_exact(budget: Budget) -> None:
    assert resolve(budget, CURVE) is EXACT


def test_between_two_points_thresholds_are_mixed() -> None:
    upper = replace(HIGH, policy=RouterPolicy(skip_threshold=0.2, max_reuses=3))
    lower = replace(FAST, policy=RouterPolicy(skip_threshold=0.6, max_reuses=3))
    answer = resolve(ComputeBudget(0.6), (EXACT, upper, lower))
    assert isinstance(answer.policy, RouterPolicy)
    assert answer.policy.skip_threshold == pytest.approx(0.4)
    assert answer.policy.max_reuses == 3
    assert answer.quality == pytest.approx(0.88)
    assert answer.relative_seconds == pytest.approx(0.7)
    assert answer.preset is None


def test_between_points_of_other_reuse_a_cap_goes_down_and_a_floor_up() -> None:
    assert resolve(ComputeBudget(0.6), CURVE) == FAST
    assert resolve(QualityBudget(0.9), CURVE) == HIGH


def test_between_exact_and_the_first_elastic_point_a_cap_goes_down_and_a_floor_up() -> None:
    assert resolve(ComputeBudget(0.9), CURVE) == HIGH
    assert resolve(QualityBudget(0.98), CURVE) == EXACT


@pytest.mark.parametrize("budget", [ComputeBudget(0.1), QualityBudget(0.1)])
def test_below_the_lowest_point_the_lowest_is_given(budget: Budget) -> None:
    assert resolve(budget, CURVE) == FAST


def test_unnamed_preset_is_refused_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match=r"preset 'draft' is not calibrated.*exact, high, fast") as error:
        resolve(PresetBudget(Preset.DRAFT), CURVE)
    assert error.value.param == "budget"


@given(st.floats(0.001, 0.999))
def test_a_model_calibrated_for_exact_only_refuses_a_cap(compute_ratio: float) -> None:
    with pytest.raises(InvalidRequest, match=f"compute_ratio {compute_ratio} is not possible"):
        resolve(ComputeBudget(compute_ratio), (EXACT,))


def test_cap_on_steps_too_few_to_forecast_is_refused_for_their_number() -> None:
    short = [point.at(1, 1, is_calibrated=True, is_cheapest=point is FORECASTS[-1]) for point in FORECASTS]
    with pytest.raises(InvalidRequest, match=r"compute_ratio 0\.2 is not possible: of so few denoise steps"):
        resolve(ComputeBudget(0.2), short)


FORECASTS = [
    EXACT,
    *(
        CurvePoint(DensePolicy(), num / 20, num / 20, quality, quality, steps=ComputedSteps(num, 20))
        for num, quality in ((8, 0.99), (6, 0.97), (4, 0.9))
    ),
]


@pytest.mark.parametrize(("quality", "num"), [(0.99, 8), (0.98, 8), (0.97, 6), (0.91, 6), (0.9, 4), (0.1, 4)])
def test_quality_between_two_numbers_of_computed_steps_takes_the_higher_one(quality: float, num: int) -> None:
    assert resolve(QualityBudget(quality), FORECASTS).steps == ComputedSteps(num, 20)


@pytest.mark.parametrize(("cap", "num"), [(0.4, 8), (0.35, 6), (0.3, 6), (0.25, 4), (0.1, 4)])
def test_cap_between_two_numbers_of_computed_steps_takes_the_lower_one(cap: float, num: int) -> None:
    assert resolve(ComputeBudget(cap), FORECASTS).steps == ComputedSteps(num, 20)
