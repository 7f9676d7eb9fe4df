"""Trained routers decide: skip under a threshold, re-use in the band above it, else run at the width they ask for.

Elastic Diffusion Transformer, arXiv 2602.13993, section 3; inference as released (Elastic-DiT at ce39f1d): a
probability equal to the threshold runs, both ends of the band belong to it, and the output of a block that runs is not
scaled by its probability. Unlike the release, thresholds are the request's policy and every row decides for itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from models.elastic.plan import MLP_WIDTHS, REUSE, RUN_IN_FULL, SKIP, Policy, RowPlan, RowView, is_protected
from models.report import Decision

_THRESHOLDS = (0.05, 0.15, 0.25, 0.4, 0.6)
# Re-uses, width bias, re-use bands. MLPs wider than routers ask for where re-use saves the more, and as they ask.
_GROUPS = ((1, -4.0, (0.6,)), (2, -4.0, (0.6,)), (3, -4.0, (0.4, 0.8)), (3, 0.0, (0.25, 0.4)))


@dataclass(frozen=True, slots=True)
class RouterPolicy(Policy):
    """A block whose depth probability is under `skip_threshold` is skipped.

    From there up to `skip_threshold + reuse_band` its stored residual is added again, at most `max_reuses` times after
    it was computed and from step `reuse_from_step` on; otherwise the block runs. `width_bias` is added to the logits of
    narrower MLP widths. The first `protected_first` and the last `protected_last` steps run every block in full.
    """

    rule: ClassVar[str] = "router"
    interpolated: ClassVar[tuple[str, ...]] = ("skip_threshold", "reuse_band")

    skip_threshold: float = 0.0
    reuse_band: float = 0.0
    max_reuses: int = 0
    reuse_from_step: int = 0
    width_bias: float = 0.0
    protected_first: int = 0
    protected_last: int = 0


OFFICIAL = RouterPolicy(skip_threshold=0.5, reuse_band=0.015, max_reuses=10, reuse_from_step=15)
"""What the released program does with its Qwen-Image checkpoint in 30 steps (Elastic-DiT at ce39f1d, literals of
`diffsynth/models/qwen_image_dit.py`)."""

PAPER = RouterPolicy(skip_threshold=0.5, reuse_band=0.1, max_reuses=5)
"""What arXiv 2602.13993 describes; it names no first step for re-use."""


class RouterRule:
    policy_type = RouterPolicy
    needs_scores = True

    def plan(self, row: RowView, policy: RouterPolicy) -> RowPlan:
        if is_protected(row, policy.protected_first, policy.protected_last):
            return RUN_IN_FULL
        assert row.depth_prob is not None
        assert row.width_logits is not None
        if row.depth_prob < policy.skip_threshold:
            return SKIP
        may_reuse = policy.reuse_band > 0 and policy.max_reuses > 0 and row.step >= policy.reuse_from_step
        if (
            may_reuse
            and row.depth_prob <= policy.skip_threshold + policy.reuse_band
            and row.num_reuses is not None
            and row.num_reuses < policy.max_reuses
        ):
            return REUSE
        return RowPlan(
            Decision.RUN,
            mlp_width(row.width_logits, policy.width_bias),
            # The last protected steps, which may be all that is left, run in full.
            keeps_residual=may_reuse and row.next_step < row.num_steps - policy.protected_last,
        )

    def ladder(self, published: Sequence[RouterPolicy]) -> list[RouterPolicy]:
        """Our grid of settings, and a range of thresholds for each published policy."""
        ours = [
            RouterPolicy(skip_threshold=threshold, reuse_band=band, max_reuses=max_reuses, width_bias=width_bias)
            for max_reuses, width_bias, bands in _GROUPS
            for band in bands
            for threshold in _THRESHOLDS
        ]
        theirs = [
            replace(policy, skip_threshold=threshold)
            for policy in published
            for threshold in sorted({*_THRESHOLDS, policy.skip_threshold})
        ]
        return ours + theirs


def mlp_width(width_logits: tuple[float, ...], width_bias: float) -> float:
    """The width with the highest logit after the bias.

    The bias counts in full for a quarter of the width, evenly less for wider ones, and not at all for the full width.
    """
    last = len(MLP_WIDTHS) - 1
    biased = [logit + width_bias * (last - i) / last for i, logit in enumerate(width_logits)]
    return MLP_WIDTHS[biased.index(max(biased))]
