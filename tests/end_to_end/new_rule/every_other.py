"""A rule as somebody would add it: every other step re-uses all blocks that have an odd number."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from models.elastic.plan import REUSE, Policy, RowPlan, RowView
from models.report import Decision


@dataclass(frozen=True, slots=True)
class EveryOtherPolicy(Policy):
    """Steps from `first_step` on take turns."""

    rule: ClassVar[str] = "every_other"
    interpolated: ClassVar[tuple[str, ...]] = ()

    first_step: int = 1


class EveryOtherRule:
    policy_type = EveryOtherPolicy
    needs_scores = False

    def plan(self, row: RowView, policy: EveryOtherPolicy) -> RowPlan:
        is_turn = row.step >= policy.first_step and (row.step - policy.first_step) % 2 == 0
        if is_turn and row.block_index % 2 == 1 and row.num_reuses == 0:
            return REUSE
        return RowPlan(Decision.RUN, keeps_residual=row.step + 1 < row.num_steps)

    def ladder(self, published: Sequence[EveryOtherPolicy]) -> list[EveryOtherPolicy]:
        return [EveryOtherPolicy(first_step) for first_step in (1, 5)]
