"""Plans: what one row does in one block, what a rule may look at to decide it, and what a rule is."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from models.report import Decision

MLP_WIDTHS = (0.25, 0.5, 0.75, 1.0)
"""The share of hidden neurons that each width index keeps."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A rule's settings for one request. Each rule has a type of its own.

    `rule` names the rule. Curves may be read as straight lines between points that differ in `interpolated` fields
    alone.
    """

    rule: ClassVar[str]
    interpolated: ClassVar[tuple[str, ...]] = ()

    @property
    def skip_threshold(self) -> float:
        """Blocks with a depth probability under it are skipped: 0 for rules that have no such setting."""
        return 0.0


@dataclass(frozen=True, slots=True)
class RowView:
    """One row before one block, on the host.

    `next_step` is the step that will be computed after this one, `num_steps` if there is none.
    `depth_prob` and `width_logits` are the router's (None where no router ran). `num_reuses` counts since the row's
    stored residual of this block was computed and is None if there is none.
    """

    step: int
    num_steps: int
    block_index: int
    depth_prob: float | None
    width_logits: tuple[float, ...] | None
    num_reuses: int | None
    next_step: int


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What a row does in a block.

    `mlp_width` matters, and `keeps_residual` can be true, only if the block runs: then what it adds is stored for later
    steps. After the last computed step nothing is stored.
    """

    decision: Decision
    mlp_width: float = 1.0
    keeps_residual: bool = False


RUN_IN_FULL = RowPlan(Decision.RUN)
SKIP = RowPlan(Decision.SKIP)
REUSE = RowPlan(Decision.REUSE)

P_contra = TypeVar("P_contra", bound=Policy, contravariant=True)


class Rule(Protocol[P_contra]):
    """A way to decide. Rules are pure: a plan follows from the view and the policy alone. A plan that does not re-use a
    stored residual would be the same without it: blocks that run let theirs go, and a failed step is repeated.

    `needs_scores` says whether routers must run.
    """

    @property
    def needs_scores(self) -> bool: ...

    def plan(self, row: RowView, policy: P_contra) -> RowPlan: ...


def is_protected(row: RowView, first: int, last: int) -> bool:
    """Whether the row is at one of the `first` or the `last` steps, which run in full."""
    return row.step < first or row.step >= row.num_steps - last
