"""Every block runs at full width: the unmodified model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from models.elastic.plan import RUN_IN_FULL, Policy, RowPlan, RowView


@dataclass(frozen=True, slots=True)
class DensePolicy(Policy):
    """There is nothing to set."""

    rule: ClassVar[str] = "dense"

    @property
    def may_reuse(self) -> bool:
        return False


class DenseRule:
    policy_type = DensePolicy
    needs_scores = False

    def plan(self, row: RowView, policy: DensePolicy) -> RowPlan:
        return RUN_IN_FULL

    def ladder(self, published: Sequence[DensePolicy]) -> list[DensePolicy]:
        return []  # the exact point of every curve is dense, and needs no measurement
