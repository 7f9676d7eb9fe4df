"""One row of a batch, and the changes that a step makes to it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from models.elastic.compute import BlockCost
from models.elastic.plan import Policy, Rule
from models.report import StepDecision


@dataclass(frozen=True, slots=True)
class Residual:
    """What a block added to a row's two streams, `(tokens, channels)` each, and how often this was re-used since.

    The text stream's part has real tokens only, since the padding may differ from step to step.
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

    `residuals` has None where a stored residual is outdated.
    """

    flops: float = 0.0
    trace: list[StepDecision] = field(default_factory=list)
    residuals: dict[str, Residual | None] = field(default_factory=dict)


@dataclass(slots=True)
class Row:
    """One row of a batch: one guidance branch of one request, with all the state of its elasticity.

    `residuals` maps block names to stored residuals. All branches of a request share one `allowance`. `begin_step` and
    `end_step` frame a step.
    """

    rule: Rule[Any]
    policy: Policy
    branch: str
    num_steps: int
    costs: Mapping[str, BlockCost]
    step: int = 0
    allowance: Allowance = field(default_factory=Allowance)
    residuals: dict[str, Residual] = field(default_factory=dict)
    spent_flops: float = 0.0
    trace: list[StepDecision] = field(default_factory=list)
    journal: StepJournal = field(default_factory=StepJournal)

    def fork(self) -> "Row":
        """A copy that goes its own way from here."""
        return replace(self, residuals=dict(self.residuals), trace=[*self.trace])

    def begin_step(self, step: int, policy: Policy, allowance: Allowance) -> None:
        self.step, self.policy, self.allowance = step, policy, allowance
        self.journal = StepJournal()

    def end_step(self) -> None:
        self.spent_flops += self.journal.flops
        self.trace += self.journal.trace
        kept = self.residuals | self.journal.residuals
        self.residuals = {name: residual for name, residual in kept.items() if residual is not None}
        self.journal = StepJournal()
