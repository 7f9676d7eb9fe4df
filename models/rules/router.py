"""Trained routers decide: skip under a threshold, re-use in the band above it, else run at the width they ask for.

Elastic Diffusion Transformer, arXiv 2602.13993, section 3; inference as released (Elastic-DiT at ce39f1d): a
probability of exactly the threshold runs, both ends of the band belong to it, a block that runs is not scaled by it.
Unlike the release, thresholds are the request's policy and every row decides for itself.
"""

from models.card import Policy
from models.elastic.plan import REUSE, RUN_IN_FULL, SKIP, RowPlan, RowView, is_protected
from models.elastic.router import MLP_WIDTHS
from models.report import Decision

OFFICIAL = Policy(skip_threshold=0.5, reuse_band=0.015, max_reuses=10, reuse_from_step=15)
"""What the released program does with its Qwen-Image checkpoint in 30 steps (Elastic-DiT at ce39f1d, literals of
`diffsynth/models/qwen_image_dit.py`)."""

PAPER = Policy(skip_threshold=0.5, reuse_band=0.1, max_reuses=5)
"""What arXiv 2602.13993 describes; it names no first step for re-use."""


class RouterRule:
    name = "router"
    needs_scores = True
    needs_residual_change = False

    def plan(self, row: RowView, policy: Policy) -> RowPlan:
        if is_protected(row, policy):
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
            keeps_residual=may_reuse and row.step + 1 < row.num_steps,
        )


def mlp_width(width_logits: tuple[float, ...], width_bias: float) -> float:
    """The width with the highest logit after the bias: all of it at a quarter, evenly less up to none at full width."""
    last = len(MLP_WIDTHS) - 1
    biased = [logit + width_bias * (last - i) / last for i, logit in enumerate(width_logits)]
    return MLP_WIDTHS[biased.index(max(biased))]
