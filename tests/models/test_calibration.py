import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.calibration import calibrate, efficient, name_presets, thinned
from models.curve import EXACT, CurvePoint, Preset
from models.engine import Engine
from models.request import GenerationRequest
from models.rules import ladder
from models.rules.router import RouterPolicy

points = st.builds(
    CurvePoint,
    policy=st.just(RouterPolicy()),
    compute_ratio=st.floats(0, 1) | st.sampled_from([0.25, 0.5, 1.0]),
    relative_seconds=st.just(1.0),
    quality=st.floats(0, 1) | st.sampled_from([0.25, 0.5, 1.0]),
)


@given(st.lists(points, max_size=12))
def test_efficient_points_descend_strictly_in_compute_and_quality(measured: list[CurvePoint]) -> None:
    for upper, lower in pairwise([EXACT, *efficient(measured)]):
        assert upper.compute_ratio > lower.compute_ratio
        assert upper.quality > lower.quality


@given(st.lists(points, max_size=12))
def test_efficient_points_are_those_that_none_beats(measured: list[CurvePoint]) -> None:
    kept = efficient(measured)
    for point in measured:
        if point.compute_ratio < 1 and point.quality < 1:
            assert any(k.compute_ratio <= point.compute_ratio and k.quality >= point.quality for k in kept)
    assert all(point in measured for point in kept)


@given(st.lists(points, max_size=12), st.randoms(use_true_random=False))
def test_efficient_points_do_not_depend_on_the_order_of_measuring(
    measured: list[CurvePoint], rng: random.Random
) -> None:
    shuffled = list(measured)
    rng.shuffle(shuffled)
    assert efficient(shuffled) == efficient(measured)


@given(st.lists(points, max_size=12))
def test_thinned_curve_has_no_near_twins_and_a_better_point_for_each_that_went(measured: list[CurvePoint]) -> None:
    curve = efficient(measured)
    kept = thinned(curve)
    assert all(upper.compute_ratio - lower.compute_ratio >= 0.0149 for upper, lower in pairwise(kept))
    for point in set(curve) - set(kept):
        assert any(0 <= k.compute_ratio - point.compute_ratio < 0.0151 and k.quality > point.quality for k in kept)


@given(st.lists(st.floats(0.01, 0.99), max_size=8, unique=True))
def test_a_faster_preset_never_costs_more(ratios: list[float]) -> None:
    curve = name_presets([CurvePoint(RouterPolicy(), ratio, ratio, ratio) for ratio in sorted(ratios)[::-1]])
    cost = {point.preset: point.compute_ratio for point in curve if point.preset}
    named = [cost[preset] for preset in Preset if preset in cost]
    assert named == sorted(named, reverse=True)


@given(st.lists(points, max_size=12))
def test_each_preset_names_at_most_one_point(measured: list[CurvePoint]) -> None:
    names = [point.preset for point in name_presets(efficient(measured)) if point.preset]
    assert len(names) == len(set(names))
    assert Preset.EXACT not in names


def test_presets_name_the_points_nearest_to_their_compute() -> None:
    ratios = [0.95, 0.82, 0.7, 0.6, 0.47, 0.4, 0.3]
    curve = [CurvePoint(RouterPolicy(), ratio, ratio, ratio) for ratio in ratios]
    named = {point.compute_ratio: point.preset for point in name_presets(curve) if point.preset}
    assert named == {0.82: Preset.HIGH, 0.6: Preset.BALANCED, 0.47: Preset.FAST, 0.3: Preset.DRAFT}


PUBLISHED = (
    RouterPolicy(skip_threshold=0.5, reuse_band=0.05, max_reuses=7, reuse_from_step=3),
    RouterPolicy(0.33, 0.2, 5),
)


@pytest.mark.parametrize(("rule", "published"), [("router", ()), ("router", PUBLISHED), ("residual_cache", ())])
def test_no_setting_is_tried_twice(rule: str, published: tuple[RouterPolicy, ...]) -> None:
    settings = ladder(rule, published)
    assert len(set(settings)) == len(settings)


def test_published_policies_are_tried_as_they_are_and_at_other_thresholds() -> None:
    added = [policy for policy in ladder("router", PUBLISHED) if policy not in ladder("router", ())]
    for policy in PUBLISHED:
        assert policy in added
        routed = [other for other in added if isinstance(other, RouterPolicy)]
        of_it = [replace(other, skip_threshold=policy.skip_threshold) for other in routed]
        assert of_it.count(policy) > 3


@pytest.mark.slow
def test_calibration_measures_a_descending_curve(
    engine: Engine, ask: Callable[..., GenerationRequest], capsys: pytest.CaptureFixture[str]
) -> None:
    curve = calibrate(engine, [ask()], rule="router")
    assert len(capsys.readouterr().out.splitlines()) == len(ladder("router", ()))
    assert curve[0].preset == Preset.EXACT
    assert (curve[0].rule, curve[0].compute_ratio, curve[0].quality) == ("dense", 1, 1)
    assert len(curve) > 1
    for upper, lower in pairwise(curve):
        assert upper.compute_ratio > lower.compute_ratio
        assert upper.quality > lower.quality
    assert all(point.rule == "router" for point in curve[1:])
    assert all(point.relative_seconds > 0 for point in curve)
