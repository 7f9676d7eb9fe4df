"""A calibration curve: what a model's settings cost and how near their results stay to the exact ones. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
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
class ComputedSteps:
    """How many steps are computed `of` a schedule's; the others are forecast."""

    computed: int
    of: int


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One measured point of a calibration curve.

    `steps` says how many steps are computed, None for all of them; `policy` is what blocks do in a computed step.
    `compute_ratio` is the mean share of dense block compute, `relative_seconds` denoise time over dense time. `quality`
    is the similarity to the exact result that nine of ten samples reach, `mean_quality` the mean. `preset` names the
    point, if it has a name. `is_calibrated` is false where the point is used for requests unlike the measured ones.
    """

    policy: Policy
    compute_ratio: float
    relative_seconds: float
    quality: float
    mean_quality: float
    preset: Preset | None = None
    steps: ComputedSteps | None = None
    is_calibrated: bool = True

    @property
    def rule(self) -> str:
        """The rule of the steps and that of the blocks, where they are not dense."""
        rules = [FORECAST] * (self.steps is not None) + [self.policy.rule] * (not self.is_block_dense)
        return "+".join(rules) or self.policy.rule

    @property
    def is_block_dense(self) -> bool:
        """Whether every block of a computed step runs in full."""
        return isinstance(self.policy, DensePolicy)

    @property
    def is_exact(self) -> bool:
        """Whether every block of every step runs in full."""
        return self.is_block_dense and self.steps is None

    @property
    def computed_share(self) -> float:
        """The share of steps that are computed."""
        return 1.0 if self.steps is None else self.steps.computed / self.steps.of

    @property
    def relative_step_seconds(self) -> float:
        """The time of a computed step over that of a dense one."""
        return self.relative_seconds / self.computed_share

    def num_computed_steps(self, num_steps: int, compute_cap: float | None = None) -> int:
        """How many of `num_steps` steps are computed, at least one.

        `compute_cap` is the share of the dense compute that the generation may use; it may forecast more steps.
        """
        if self.steps is None:
            return num_steps
        # Rounding must not take a step away.
        affordable = num_steps if compute_cap is None else int(compute_cap * num_steps + 1e-9)
        return min(max(1, min(self.steps.computed, affordable)), num_steps)

    def dense_steps_left(self, steps_left: int, num_computed: int) -> float:
        """The time that the last `steps_left` steps take at this point, in dense steps.

        `num_computed` steps were computed before. One more at least is computed, if any are left.
        """
        to_compute = steps_left if self.steps is None else max(self.steps.computed - num_computed, 1)
        return min(to_compute, steps_left) * self.relative_step_seconds

    def at(self, num_steps: int, num_needed: int, *, is_calibrated: bool, is_cheapest: bool = False) -> "CurvePoint":
        """This point for requests that take so many steps, of which `num_needed` are computed.

        Outside of what was calibrated, one more step is computed. A short schedule is exact. Only the cheapest point of
        a curve still forecasts a step then, so that caps can be met.
        """
        if self.is_exact:
            return self
        if self.steps is None:
            return replace(self, is_calibrated=is_calibrated)
        computed = num_needed if is_calibrated else num_needed + 1
        if is_cheapest:
            computed = max(1, min(computed, num_steps - 1))
        if computed >= num_steps and self.is_block_dense:
            return replace(EXACT, preset=self.preset)
        steps = ComputedSteps(min(computed, num_steps), num_steps)
        scale = steps.computed / steps.of / self.computed_share
        return replace(
            self,
            compute_ratio=min(1.0, scale * self.compute_ratio),
            relative_seconds=scale * self.relative_seconds,
            steps=steps,
            is_calibrated=is_calibrated,
        )


FORECAST = "forecast"
"""The name of the rule for steps."""

EXACT = CurvePoint(DensePolicy(), 1.0, 1.0, 1.0, 1.0, Preset.EXACT)


def point_entry(point: CurvePoint) -> dict[str, Any]:
    """A point as JSON has it."""
    return {
        **policy_entry(point.policy),
        "steps": asdict(point.steps) if point.steps else None,
        "compute_ratio": point.compute_ratio,
        "relative_seconds": point.relative_seconds,
        "quality": point.quality,
        "mean_quality": point.mean_quality,
        "preset": point.preset,
        "is_calibrated": point.is_calibrated,
    }


def point_of(entry: Mapping[str, Any]) -> CurvePoint:
    """The point of an `entry` that `point_entry` wrote.

    Raises WeightsError for a rule or a setting that is unknown, KeyError, TypeError or ValueError for a malformed
    entry.
    """
    return CurvePoint(
        policy=policy_of(entry),
        compute_ratio=entry["compute_ratio"],
        relative_seconds=entry["relative_seconds"],
        quality=entry["quality"],
        mean_quality=entry["mean_quality"],
        preset=Preset(entry["preset"]) if entry["preset"] else None,
        steps=ComputedSteps(**entry["steps"]) if entry["steps"] else None,
        is_calibrated=entry["is_calibrated"],
    )
