"""From a budget to a place on a model's calibration curve. Pure: no torch, no clocks."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from models.curve import CurvePoint, Preset
from models.errors import InvalidRequest
from models.request import Budget, ComputeBudget, LatencyBudget, PresetBudget, QualityBudget


def resolve(budget: Budget, curve: Sequence[CurvePoint]) -> CurvePoint:
    """The point of `curve` that `budget` asks for, interpolated between measured points where possible.

    `curve` begins with the exact point and descends in compute and quality. A budget below the lowest measured quality
    or compute gets the lowest point; a compute cap is enforced during generation. Raises InvalidRequest for a preset
    that the curve does not name, and for a compute ratio if only the exact point is calibrated.
    """
    match budget:
        case PresetBudget(preset):
            return point_of_preset(preset, curve)
        case QualityBudget(quality):
            return point_of_quality(quality, curve)
        case ComputeBudget(compute_ratio):
            if curve[-1].is_exact and compute_ratio < 1:
                reason = "this model is calibrated for exact only"
                if len(curve) > 1:  # its other points became exact: they compute all steps that are taken
                    reason = "of so few denoise steps, every one is computed"
                raise InvalidRequest(
                    f"compute_ratio {compute_ratio} is not possible: {reason}; try 1", "budget.compute_ratio"
                )
            return point_of_compute(compute_ratio, curve)
        case LatencyBudget():
            return curve[0]  # the best one, until the worker, which has a clock, moves it


def fastest_enough(
    curve: Sequence[CurvePoint], min_quality: float, dense_steps: float, *, steps_left: int, num_computed: int = 0
) -> CurvePoint:
    """The best point of `curve` that is fast enough, but never below the point of `min_quality`.

    The last `steps_left` steps may take the time of `dense_steps` dense ones. `num_computed` were computed before.
    """
    floor = point_of_quality(min_quality, curve)
    able = (
        point
        for point in curve
        if point.quality >= floor.quality and point.dense_steps_left(steps_left, num_computed) <= dense_steps
    )
    return next(able, floor)


def point_of_quality(quality: float, curve: Sequence[CurvePoint]) -> CurvePoint:
    """The cheapest point of at least `quality`; the lowest one of the curve if `quality` is below that."""
    return _between(curve, [point.quality for point in curve], quality, is_floor=True)


def point_of_compute(compute_ratio: float, curve: Sequence[CurvePoint]) -> CurvePoint:
    """The best point of at most `compute_ratio`; the lowest one of the curve if `compute_ratio` is below that."""
    return _between(curve, [point.compute_ratio for point in curve], compute_ratio, is_floor=False)


def point_of_preset(preset: Preset, curve: Sequence[CurvePoint]) -> CurvePoint:
    for point in curve:
        if point.preset == preset:
            return point
    offered = ", ".join(point.preset for point in curve if point.preset)
    raise InvalidRequest(f"preset '{preset}' is not calibrated for this model; it offers: {offered}", "budget")


def _between(curve: Sequence[CurvePoint], heights: Sequence[float], wanted: float, is_floor: bool) -> CurvePoint:
    """The point whose height is `wanted`; between measured points the curve is a straight line.

    Points have something between them if they compute as many steps, are of one rule, and differ only in what that lets
    interpolate. Otherwise the answer is the upper one where `wanted` is a floor, the lower one where it is a cap.
    """
    if wanted >= heights[0]:
        return curve[0]
    for (upper, high), (lower, low) in pairwise(zip(curve, heights, strict=True)):
        if low == wanted:
            return lower
        if low < wanted:
            if not _have_points_between(upper, lower):
                return upper if is_floor else lower
            return _interpolate(upper, lower, (wanted - low) / (high - low))
    return curve[-1]


def _have_points_between(upper: CurvePoint, lower: CurvePoint) -> bool:
    if upper.policy.rule != lower.policy.rule or upper.steps != lower.steps:
        return False
    levelled = replace(upper.policy, **{name: getattr(lower.policy, name) for name in upper.policy.interpolated})
    return levelled == lower.policy


def _interpolate(upper: CurvePoint, lower: CurvePoint, share: float) -> CurvePoint:
    """A point `share` of the way from `lower` up to `upper`, which differ in interpolated fields alone."""
    mixed = {
        name: getattr(lower.policy, name) + share * (getattr(upper.policy, name) - getattr(lower.policy, name))
        for name in lower.policy.interpolated
    }
    return replace(
        lower,
        policy=replace(lower.policy, **mixed),
        compute_ratio=lower.compute_ratio + share * (upper.compute_ratio - lower.compute_ratio),
        relative_seconds=lower.relative_seconds + share * (upper.relative_seconds - lower.relative_seconds),
        quality=lower.quality + share * (upper.quality - lower.quality),
        mean_quality=lower.mean_quality + share * (upper.mean_quality - lower.mean_quality),
        preset=None,
    )
