"""A calibration curve: what a model's settings cost and how near their results stay to the exact ones. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from models.elastic.plan import Policy
from models.rules import policy_entry, policy_of
from models.rules.dense import DensePolicy


class Preset(StrEnum):
    """Named points of a calibration curve, from the unmodified pipeline to the fastest."""

    EXACT = "exact"
    HIGH = "high"
    BALANCED = "balanced"
    FAST = "fast"
    DRAFT = "draft"


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One measured point of a calibration curve.

    `compute_ratio` is the mean share of dense block compute, `relative_seconds` denoise time over dense time, `quality`
    the mean similarity to the exact result, all over the calibration set. `preset` names the point, if it has a name.
    """

    policy: Policy
    compute_ratio: float
    relative_seconds: float
    quality: float
    preset: Preset | None = None

    @property
    def rule(self) -> str:
        return self.policy.rule

    @property
    def is_exact(self) -> bool:
        """Whether every block runs in full."""
        return isinstance(self.policy, DensePolicy)


EXACT = CurvePoint(DensePolicy(), 1.0, 1.0, 1.0, Preset.EXACT)


def point_entry(point: CurvePoint) -> dict[str, Any]:
    """A point as JSON has it."""
    return {
        **policy_entry(point.policy),
        "compute_ratio": point.compute_ratio,
        "relative_seconds": point.relative_seconds,
        "quality": point.quality,
        "preset": point.preset,
    }


def point_of(entry: Mapping[str, Any]) -> CurvePoint:
    """The point of an `entry` that `point_entry` wrote.

    Raises WeightsError for a rule or a setting that is unknown, KeyError or ValueError for a malformed entry.
    """
    return CurvePoint(
        policy=policy_of(entry),
        compute_ratio=entry["compute_ratio"],
        relative_seconds=entry["relative_seconds"],
        quality=entry["quality"],
        preset=Preset(entry["preset"]) if entry["preset"] else None,
    )
