"""Plans: what one row does in one block, and what a rule may look at to decide it."""

from dataclasses import dataclass
from typing import Protocol

from models.card import Policy
from models.report import Decision


@dataclass(frozen=True, slots=True)
class RowView:
    """One row before one block, on the host.

    `depth_prob` and `width_logits` are the router's (None where no router ran). `num_reuses` counts since the row's
    stored residual was computed and is None if there is none. `residual_change` is how far the first block's residual
    moved, relative to its size, since the last computed step (None before that is known, and in the first block).
    """

    step: int
    num_steps: int
    block_index: int
    depth_prob: float | None
    width_logits: tuple[float, ...] | None
    num_reuses: int | None
    residual_change: float | None


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What a row does in a block. `mlp_width` matters, and `keeps_residual` can be true, only if it runs."""

    decision: Decision
    mlp_width: float = 1.0
    keeps_residual: bool = False


RUN_IN_FULL = RowPlan(Decision.RUN)
SKIP = RowPlan(Decision.SKIP)
REUSE = RowPlan(Decision.REUSE)


class Rule(Protocol):
    """A way to decide. Rules are pure: the same view and policy give the same plan, whatever else is in the batch.

    `needs_scores` says whether routers must run, `needs_residual_change` whether the first block's change is measured.
    """

    name: str
    needs_scores: bool
    needs_residual_change: bool

    def plan(self, row: RowView, policy: Policy) -> RowPlan: ...


def is_protected(row: RowView, policy: Policy) -> bool:
    """Whether the row is at a step that its policy runs in full."""
    return row.step < policy.protected_first or row.step >= row.num_steps - policy.protected_last
