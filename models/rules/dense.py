"""Everything runs, at full width: the unmodified model."""

from models.card import Policy
from models.elastic.plan import RUN_IN_FULL, RowPlan, RowView


class DenseRule:
    name = "dense"
    needs_scores = False
    needs_residual_change = False

    def plan(self, row: RowView, policy: Policy) -> RowPlan:
        return RUN_IN_FULL
