"""One row of a batch, and the changes that a step makes to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from models.elastic.compute import BlockCost
from models.elastic.plan import Policy, RowPlan, Rule
from models.report import StepDecision


@dataclass(frozen=True, slots=True)
class Residual:
    """What a block added to a row's two streams, `(tokens, channels)` each, and how often this was re-used since.

    The text stream's part has real tokens only, since the padding may differ from step to step. Both own their memory:
    views would keep the whole batch's streams.
    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    num_reuses: int = 0


@dataclass(slots=True)
class Allowance:
    """Floating-point operations that a request may still spend in this step. Infinite unless its budget is a cap."""

    flops: float = float("inf")


@dataclass(slots=True)
class StepJournal:
    """The changes that one step makes to a row. They take effect at its end, so a failed step can be repeated.

    `plans` has one plan per block, in order.
    """

    flops: float = 0.0
    plans: list[RowPlan] = field(default_factory=list)
    residuals: dict[str, Residual] = field(default_factory=dict)


class StepPlans(NamedTuple):
    """What a row did in each block of a computed step, in the order of the blocks."""

    step: int
    plans: Sequence[RowPlan]


@dataclass(slots=True)
class Row:
    """One row of a batch: one guidance branch of one request, with all the state of its elasticity.

    `residuals` maps block names to stored residuals. `costs` has the blocks in order. `next_step` is the step that will
    be computed after `step`, `num_steps` if there is none. All branches of a request share one `allowance`.
    `begin_step` and `end_step` frame a step. `history` has the computed steps so far.
    """

    rule: Rule[Any]
    policy: Policy
    branch: str
    num_steps: int
    costs: Mapping[str, BlockCost]
    step: int = 0
    next_step: int = 1
    allowance: Allowance = field(default_factory=Allowance)
    residuals: dict[str, Residual] = field(default_factory=dict)
    spent_flops: float = 0.0
    history: list[StepPlans] = field(default_factory=list)
    journal: StepJournal = field(default_factory=StepJournal)

    def fork(self) -> "Row":
        """A copy that goes its own way from here."""
        return replace(self, residuals=dict(self.residuals), history=[*self.history])

    @property
    def has_next_step(self) -> bool:
        """Whether a step will be computed after this one. If not, no residual is of use any more."""
        return self.next_step < self.num_steps

    @property
    def trace(self) -> list[StepDecision]:
        """The decisions of all computed steps, in order."""
        return [
            StepDecision(step, self.branch, block, plan.decision, plan.mlp_width)
            for step, plans in self.history
            for block, plan in zip(self.costs, plans, strict=True)
        ]

    def begin_step(self, step: int, next_step: int, policy: Policy, allowance: Allowance) -> None:
        self.step, self.next_step, self.policy, self.allowance = step, next_step, policy, allowance
        self.journal = StepJournal()

    def let_go(self, block: str) -> None:
        """Free the stored residual of a block that runs, before it runs: the old and the new one together are twice
        the memory. If the step fails, its repetition finds no residual, and runs the block again.
        """
        self.residuals.pop(block, None)

    def end_step(self) -> None:
        self.spent_flops += self.journal.flops
        self.history.append(StepPlans(self.step, self.journal.plans))
        self.residuals = self.residuals | self.journal.residuals if self.has_next_step else {}
        self.journal = StepJournal()
