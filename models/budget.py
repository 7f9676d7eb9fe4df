"""From a budget to a place on a model's calibration curve. Pure: no torch, no clocks."""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise

from models.card import CurvePoint, Policy
from models.errors import InvalidRequest
from models.request import Budget, ComputeBudget, Preset, PresetBudget, QualityBudget


def resolve(budget: Budget, curve: Sequence[CurvePoint]) -> CurvePoint:
    """The place on `curve` that `budget` asks for, between measured points where needed.

    `curve` begins with the exact point and descends in compute and quality. Below the lowest measured quality or
    compute the answer is the lowest point; a cap itself is enforced while generating. Raises InvalidRequest for a
    preset that the curve does not name.
    """
    match budget:
        case PresetBudget(preset):
            return point_of_preset(preset, curve)
        case QualityBudget(quality):
            return _between(curve, [point.quality for point in curve], quality, is_floor=True)
        case ComputeBudget(compute_ratio):
            if curve[-1].rule == "dense" and compute_ratio < 1:
                raise InvalidRequest(
                    f"compute_ratio {compute_ratio} is not possible: this model is calibrated for exact only; try 1",
                    "budget.compute_ratio",
                )
            return _between(curve, [point.compute_ratio for point in curve], compute_ratio, is_floor=False)


def point_of_preset(preset: Preset, curve: Sequence[CurvePoint]) -> CurvePoint:
    for point in curve:
        if point.preset == preset:
            return point
    offered = ", ".join(point.preset for point in curve if point.preset)
    raise InvalidRequest(f"preset '{preset}' is not calibrated for this model; it offers: {offered}", "budget")


def _between(curve: Sequence[CurvePoint], heights: Sequence[float], wanted: float, is_floor: bool) -> CurvePoint:
    """The point of the curve, read as straight lines between measured points, whose height is `wanted`.

    Points of different rules (the exact one and the first elastic one) have no thresholds to mix: between them the
    answer is the upper one where `wanted` is a floor, the lower one where it is a cap.
    """
    if wanted >= heights[0]:
        return curve[0]
    for (upper, high), (lower, low) in pairwise(zip(curve, heights, strict=True)):
        if low == wanted:
            return lower
        if low < wanted:
            if upper.rule != lower.rule:
                return upper if is_floor else lower
            return _interpolate(upper, lower, (wanted - low) / (high - low))
    return curve[-1]


def _interpolate(upper: CurvePoint, lower: CurvePoint, share: float) -> CurvePoint:
    """A point `share` of the way from `lower` up to `upper`, both of one rule."""
    mixed = {}
    for field in fields(Policy):
        low, high = getattr(lower.policy, field.name), getattr(upper.policy, field.name)
        value = low + share * (high - low)
        mixed[field.name] = round(value) if isinstance(low, int) and isinstance(high, int) else value
    return replace(
        lower,
        policy=Policy(**mixed),
        compute_ratio=lower.compute_ratio + share * (upper.compute_ratio - lower.compute_ratio),
        relative_seconds=lower.relative_seconds + share * (upper.relative_seconds - lower.relative_seconds),
        quality=lower.quality + share * (upper.quality - lower.quality),
        preset=None,
    )
