import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.elastic.plan import MLP_WIDTHS, RowView
from models.report import Decision
from models.rules.router import RouterPolicy, RouterRule, mlp_width

RULE = RouterRule()
FULL, HALF = (0.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 0.0)
BAND = RouterPolicy(skip_threshold=0.5, reuse_band=0.25, max_reuses=2)


def row(
    depth_prob: float,
    *,
    step: int = 3,
    num_reuses: int | None = None,
    width_logits: tuple[float, ...] = FULL,
    next_step: int | None = None,
) -> RowView:
    return RowView(step, 8, 1, depth_prob, width_logits, num_reuses, step + 1 if next_step is None else next_step)


def test_probability_under_the_threshold_skips() -> None:
    assert RULE.plan(row(math.nextafter(0.5, 0)), BAND).decision is Decision.SKIP


def test_probability_at_the_threshold_runs() -> None:
    assert RULE.plan(row(0.5), BAND).decision is Decision.RUN


@pytest.mark.parametrize(
    ("depth_prob", "decision"),
    [
        (math.nextafter(0.5, 0), Decision.SKIP),
        (0.5, Decision.REUSE),
        (0.6, Decision.REUSE),
        (0.75, Decision.REUSE),
        (math.nextafter(0.75, 1), Decision.RUN),
        (1.0, Decision.RUN),
    ],
)
def test_both_ends_belong_to_the_band(depth_prob: float, decision: Decision) -> None:
    assert RULE.plan(row(depth_prob, num_reuses=0), BAND).decision is decision


@pytest.mark.parametrize(
    ("num_reuses", "decision"),
    [(None, Decision.RUN), (0, Decision.REUSE), (1, Decision.REUSE), (2, Decision.RUN)],
)
def test_residual_is_used_at_most_as_often_as_the_policy_says(num_reuses: int | None, decision: Decision) -> None:
    assert RULE.plan(row(0.6, num_reuses=num_reuses), BAND).decision is decision


@pytest.mark.parametrize(("step", "decision"), [(2, Decision.RUN), (3, Decision.REUSE)])
def test_reuse_begins_at_its_step(step: int, decision: Decision) -> None:
    policy = RouterPolicy(skip_threshold=0.5, reuse_band=0.25, max_reuses=2, reuse_from_step=3)
    assert RULE.plan(row(0.6, step=step, num_reuses=0), policy).decision is decision


@pytest.mark.parametrize(("step", "keeps"), [(2, False), (3, True), (6, True), (7, False)])
def test_residual_is_kept_from_the_first_step_of_reuse_to_the_last_but_one(step: int, keeps: bool) -> None:
    policy = RouterPolicy(skip_threshold=0.5, reuse_band=0.25, max_reuses=2, reuse_from_step=3)
    assert RULE.plan(row(0.9, step=step), policy).keeps_residual is keeps


@pytest.mark.parametrize(("step", "next_step", "keeps"), [(4, 5, True), (5, 6, False), (6, 7, False), (3, 6, False)])
def test_no_residual_is_kept_for_protected_steps(step: int, next_step: int, keeps: bool) -> None:
    policy = replace(BAND, protected_last=2)
    assert RULE.plan(row(0.9, step=step, next_step=next_step), policy).keeps_residual is keeps


def test_without_a_band_nothing_is_reused_or_kept() -> None:
    plan = RULE.plan(row(0.5, num_reuses=0), RouterPolicy(skip_threshold=0.5, max_reuses=2))
    assert plan.decision is Decision.RUN
    assert not plan.keeps_residual


@pytest.mark.parametrize(("step", "decision"), [(0, "run"), (1, "run"), (2, "skip"), (6, "skip"), (7, "run")])
def test_protected_steps_run_whatever_the_router_says(step: int, decision: str) -> None:
    policy = RouterPolicy(skip_threshold=0.5, protected_first=2, protected_last=1)
    assert RULE.plan(row(0.1, step=step), policy).decision == decision


def test_protected_step_runs_at_full_width() -> None:
    policy = RouterPolicy(protected_first=1, width_bias=9.0)
    assert RULE.plan(row(0.9, step=0, width_logits=HALF), policy).mlp_width == 1


@pytest.mark.parametrize("width", MLP_WIDTHS)
def test_width_is_that_of_the_highest_logit(width: float) -> None:
    logits = tuple(float(w == width) for w in MLP_WIDTHS)
    assert RULE.plan(row(0.9, width_logits=logits), RouterPolicy()).mlp_width == width


@pytest.mark.parametrize(("bias", "width"), [(-1e6, 1.0), (1e6, 0.25)])
def test_strong_bias_decides_alone(bias: float, width: float) -> None:
    assert mlp_width(HALF, bias) == width


@given(
    st.tuples(*[st.floats(-20, 20)] * len(MLP_WIDTHS)),
    st.lists(st.floats(-40, 40), min_size=2, max_size=6),
)
def test_more_bias_is_never_wider(logits: tuple[float, ...], biases: list[float]) -> None:
    widths = [mlp_width(logits, bias) for bias in sorted(biases)]
    assert all(wider >= narrower for wider, narrower in pairwise(widths))


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_higher_threshold_never_runs_more(depth_prob: float, a: float, b: float) -> None:
    low, high = (RULE.plan(row(depth_prob), RouterPolicy(skip_threshold=t)).decision for t in sorted((a, b)))
    assert (low, high) != (Decision.SKIP, Decision.RUN)
