"""No trained weights: while the first block's residual hardly moves, the other blocks' residuals are used again.

First-block caching (ParaAttention's First Block Cache; diffusers `hooks/first_block_cache.py`), decided for each row.
"""

from models.card import Policy
from models.elastic.plan import REUSE, RUN_IN_FULL, RowPlan, RowView, is_protected
from models.report import Decision


class ResidualCacheRule:
    name = "residual_cache"
    needs_scores = False
    needs_residual_change = True

    def plan(self, row: RowView, policy: Policy) -> RowPlan:
        if row.block_index == 0:
            return RUN_IN_FULL
        run = RowPlan(Decision.RUN, keeps_residual=policy.max_reuses > 0 and row.step + 1 < row.num_steps)
        if is_protected(row, policy):
            return run
        has_settled = row.residual_change is not None and row.residual_change < policy.residual_threshold
        if has_settled and row.num_reuses is not None and row.num_reuses < policy.max_reuses:
            return REUSE
        return run
