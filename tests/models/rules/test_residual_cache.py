import math

import pytest

from models.elastic.plan import RowView
from models.report import Decision
from models.rules.residual_cache import ResidualCachePolicy, ResidualCacheRule

RULE = ResidualCacheRule()
POLICY = ResidualCachePolicy(residual_threshold=0.1, max_reuses=2)


def row(change: float | None, *, num_reuses: int | None = 0, block_index: int = 1, step: int = 3) -> RowView:
    return RowView(step, 8, block_index, None, None, num_reuses, change)


@pytest.mark.parametrize(
    ("change", "decision"),
    [
        (None, Decision.RUN),
        (0.0, Decision.REUSE),
        (math.nextafter(0.1, 0), Decision.REUSE),
        (0.1, Decision.RUN),
        (math.inf, Decision.RUN),
        (math.nan, Decision.RUN),
    ],
)
def test_residual_is_reused_only_while_the_change_is_under_the_threshold(
    change: float | None, decision: Decision
) -> None:
    assert RULE.plan(row(change), POLICY).decision is decision


@pytest.mark.parametrize(("num_reuses", "decision"), [(None, "run"), (0, "reuse"), (1, "reuse"), (2, "run")])
def test_residual_is_used_at_most_as_often_as_the_policy_says(num_reuses: int | None, decision: str) -> None:
    assert RULE.plan(row(0.0, num_reuses=num_reuses), POLICY).decision == decision


def test_first_block_always_runs_in_full_and_keeps_nothing() -> None:
    plan = RULE.plan(row(0.0, block_index=0), POLICY)
    assert (plan.decision, plan.mlp_width, plan.keeps_residual) == (Decision.RUN, 1.0, False)


@pytest.mark.parametrize(("step", "decision"), [(0, "run"), (1, "reuse"), (5, "reuse"), (6, "run"), (7, "run")])
def test_protected_steps_run(step: int, decision: str) -> None:
    policy = ResidualCachePolicy(residual_threshold=0.1, max_reuses=2, protected_first=1, protected_last=2)
    assert RULE.plan(row(0.0, step=step), policy).decision == decision


def test_protected_first_step_keeps_residuals_for_the_next() -> None:
    policy = ResidualCachePolicy(residual_threshold=0.1, max_reuses=2, protected_first=1)
    assert RULE.plan(row(None, step=0, num_reuses=None), policy).keeps_residual


def test_threshold_zero_reuses_nothing_even_without_change() -> None:
    assert RULE.plan(row(0.0), ResidualCachePolicy(max_reuses=9)).decision is Decision.RUN
