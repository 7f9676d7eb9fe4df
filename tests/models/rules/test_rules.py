"""What every rule keeps to; a new one is tested by standing in the table."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.card import CurvePoint, Policy
from models.elastic.plan import RowView, Rule
from models.elastic.router import MLP_WIDTHS
from models.engine import Engine
from models.report import Decision
from models.request import GenerationRequest
from models.rules import RULES
from models.state import DenoiseState

EVERYTHING: Mapping[str, Policy] = {
    "dense": Policy(),
    "router": Policy(skip_threshold=0.0, width_bias=-1e6),
    "residual_cache": Policy(residual_threshold=0.0, max_reuses=9),
}
"""Settings under which a rule leaves nothing out."""

LIGHT: Mapping[str, Policy] = {
    "dense": Policy(),
    "router": Policy(0.5, 0.3, 2, width_bias=1.0),
    "residual_cache": Policy(residual_threshold=1.3, max_reuses=2),
}
"""Settings under which a rule leaves out much of what it can."""

probs = st.floats(0, 1)


@st.composite
def row_views(draw: st.DrawFn) -> RowView:
    num_steps = draw(st.integers(1, 12))
    return RowView(
        step=draw(st.integers(0, num_steps - 1)),
        num_steps=num_steps,
        block_index=draw(st.integers(0, 9)),
        depth_prob=draw(probs),
        width_logits=draw(st.tuples(*[st.floats(-9, 9)] * len(MLP_WIDTHS))),
        num_reuses=draw(st.none() | st.integers(0, 5)),
        residual_change=draw(st.none() | st.floats(0, 2)),
    )


policies = st.builds(
    Policy,
    skip_threshold=probs,
    reuse_band=probs,
    max_reuses=st.integers(0, 4),
    reuse_from_step=st.integers(0, 4),
    width_bias=st.floats(-9, 9),
    residual_threshold=probs,
    protected_first=st.integers(0, 4),
    protected_last=st.integers(0, 4),
)

rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
names = pytest.mark.parametrize("name", RULES)


def point(rule: str, policy: Policy) -> CurvePoint:
    return CurvePoint(rule, policy, 1.0, 1.0, 1.0)


@names
def test_rule_stands_under_its_name(name: str) -> None:
    assert RULES[name].name == name


@rules
@given(row=row_views(), policy=policies)
def test_same_view_and_policy_give_the_same_plan(rule: Rule, row: RowView, policy: Policy) -> None:
    assert rule.plan(row, policy) == rule.plan(row, policy)


@rules
@given(row=row_views(), policy=policies)
def test_width_is_one_that_blocks_can_run(rule: Rule, row: RowView, policy: Policy) -> None:
    assert rule.plan(row, policy).mlp_width in MLP_WIDTHS


@rules
@given(row=row_views(), policy=policies)
def test_reuse_needs_a_stored_residual_with_uses_left(rule: Rule, row: RowView, policy: Policy) -> None:
    if rule.plan(row, policy).decision is Decision.REUSE:
        assert row.num_reuses is not None
        assert row.num_reuses < policy.max_reuses


@rules
@given(row=row_views(), policy=policies)
def test_protected_steps_run_in_full(rule: Rule, row: RowView, policy: Policy) -> None:
    if row.step < policy.protected_first or row.step >= row.num_steps - policy.protected_last:
        plan = rule.plan(row, policy)
        assert (plan.decision, plan.mlp_width) == (Decision.RUN, 1.0)


@rules
@given(row=row_views(), policy=policies)
def test_residual_is_kept_only_from_a_run_and_for_a_later_step(rule: Rule, row: RowView, policy: Policy) -> None:
    if rule.plan(row, policy).keeps_residual:
        assert rule.plan(row, policy).decision is Decision.RUN
        assert row.step + 1 < row.num_steps


@rules
@given(row=row_views(), policy=policies.map(lambda policy: replace(policy, max_reuses=0)))
def test_no_residual_is_kept_that_may_never_be_used(rule: Rule, row: RowView, policy: Policy) -> None:
    assert not rule.plan(row, policy).keeps_residual


@names
def test_rule_that_leaves_nothing_out_equals_dense_bit_for_bit(
    name: str,
    engine: Engine,
    ask: Callable[..., GenerationRequest],
    denoise: Callable[..., DenoiseState],
) -> None:
    request = ask(num_inference_steps=5, height=80)
    elastic = denoise(engine, request, point(name, EVERYTHING[name]))
    assert torch.equal(elastic.latents, denoise(engine, request).latents)
    assert elastic.summary().compute_ratio == 1


@names
def test_counted_compute_is_that_of_the_decisions(
    name: str,
    open_engine: Engine,
    ask: Callable[..., GenerationRequest],
    guided: Callable[..., dict[str, Any]],
    denoise: Callable[..., DenoiseState],
) -> None:
    request = ask(num_inference_steps=6, **guided())
    state = denoise(open_engine, request, point(name, LIGHT[name]))
    summary = state.summary()
    costs = {row.branch: row.costs for row in state.rows}
    assert summary.decisions is not None
    ran = sum(costs[e.branch][e.block].at_width(e.mlp_width) for e in summary.decisions if e.decision is Decision.RUN)
    ran += 6 * sum(cost.always for branch in costs.values() for cost in branch.values())
    dense = 6 * sum(cost.dense for branch in costs.values() for cost in branch.values())
    assert summary.compute_ratio == pytest.approx(ran / dense, rel=1e-9)
    assert summary.compute_ratio == 1 if name == "dense" else summary.compute_ratio < 0.9
