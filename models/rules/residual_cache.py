"""Needs no trained weights: while the first block's residual hardly changes, the other blocks re-use theirs.

First-block caching (ParaAttention's First Block Cache; diffusers `hooks/first_block_cache.py`), decided per row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from models.elastic.plan import REUSE, Policy, RowPlan, RowView, is_protected
from models.report import Decision

_OBSERVED_BLOCK = 0
_OBSERVE = RowPlan(Decision.RUN, measures_change=True)


@dataclass(frozen=True, slots=True)
class ResidualCachePolicy(Policy):
    """All blocks after the first re-use their residuals while the first block's residual stays within the threshold.

    `residual_threshold` bounds the relative change of the first block's residual since the residuals were stored; a
    stored residual is used at most `max_reuses` times. The first `protected_first` and the last `protected_last` steps
    run every block.
    """

    rule: ClassVar[str] = "residual_cache"
    interpolated: ClassVar[tuple[str, ...]] = ("residual_threshold",)

    residual_threshold: float = 0.0
    max_reuses: int = 0
    protected_first: int = 0
    protected_last: int = 0


class ResidualCacheRule:
    policy_type = ResidualCachePolicy
    needs_scores = False

    def plan(self, row: RowView, policy: ResidualCachePolicy) -> RowPlan:
        if row.block_index == _OBSERVED_BLOCK:
            return _OBSERVE
        run = RowPlan(Decision.RUN, keeps_residual=policy.max_reuses > 0 and row.step + 1 < row.num_steps)
        if is_protected(row, policy.protected_first, policy.protected_last):
            return run
        has_settled = row.residual_change is not None and row.residual_change < policy.residual_threshold
        if has_settled and row.num_reuses is not None and row.num_reuses < policy.max_reuses:
            return REUSE
        return run

    def ladder(self, published: Sequence[ResidualCachePolicy]) -> list[ResidualCachePolicy]:
        ours = [
            ResidualCachePolicy(residual_threshold=threshold, max_reuses=reuses, protected_first=1)
            for reuses in (1, 2, 4, 8)
            for threshold in (0.03, 0.06, 0.1, 0.15, 0.25, 0.4)
        ]
        return ours + [policy for policy in published if policy not in ours]
