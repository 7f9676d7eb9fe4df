"""What every rule keeps to. A rule is tested as soon as it stands in the table and here has two policies."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.curve import CurvePoint
from models.elastic.plan import MLP_WIDTHS, Policy, RowView
from models.engine import Engine
from models.errors import WeightsError
from models.report import Decision
from models.request import GenerationRequest
from models.rules import RULES, ladder, policy_entry, policy_of
from models.rules.dense import DensePolicy
from models.rules.router import RouterPolicy
from models.state import DenoiseState

EVERYTHING: Mapping[str, Policy] = {
    "dense": DensePolicy(),
    "router": RouterPolicy(skip_threshold=0.0, width_bias=-1e6),
}
"""Policies under which a rule leaves nothing out."""

LIGHT: Mapping[str, Policy] = {
    "dense": DensePolicy(),
    "router": RouterPolicy(0.5, 0.3, 2, width_bias=1.0),
}
"""Policies under which a rule leaves out much of what it can."""

REUSING: Mapping[str, tuple[Policy, RowView]] = {
    "router": (RouterPolicy(0.3, 0.4, 2), RowView(3, 8, 4, 0.5, (0.0,) * len(MLP_WIDTHS), 1, 4)),
}
"""A policy and a row that re-uses under it, of each rule that can re-use."""

probs = st.floats(0, 1)


@st.composite
def row_views(draw: st.DrawFn) -> RowView:
    num_steps = draw(st.integers(1, 12))
    step = draw(st.integers(0, num_steps - 1))
    return RowView(
        step=step,
        num_steps=num_steps,
        block_index=draw(st.integers(0, 9)),
        depth_prob=draw(probs),
        width_logits=draw(st.tuples(*[st.floats(-9, 9)] * len(MLP_WIDTHS))),
        num_reuses=draw(st.none() | st.integers(0, 5)),
        next_step=draw(st.integers(step + 1, num_steps)),
    )


POLICIES: Mapping[str, st.SearchStrategy[Policy]] = {
    "dense": st.just(DensePolicy()),
    "router": st.builds(
        RouterPolicy,
        skip_threshold=probs,
        reuse_band=probs,
        max_reuses=st.integers(0, 4),
        reuse_from_step=st.integers(0, 4),
        width_bias=st.floats(-9, 9),
        protected_first=st.integers(0, 4),
        protected_last=st.integers(0, 4),
    ),
}

names = pytest.mark.parametrize("name", RULES)
edits = pytest.mark.parametrize("is_edit", [False, True], ids=["generation", "edit"])
reusing_names = pytest.mark.parametrize("name", REUSING)


def point(policy: Policy) -> CurvePoint:
    return CurvePoint(policy, 1.0, 1.0, 1.0, 1.0)


@names
def test_rule_stands_in_the_table_under_the_name_of_its_policies(name: str) -> None:
    assert RULES[name].policy_type.rule == name


@names
@given(data=st.data(), row=row_views())
def test_width_is_one_that_blocks_can_run(name: str, data: st.DataObject, row: RowView) -> None:
    assert RULES[name].plan(row, data.draw(POLICIES[name])).mlp_width in MLP_WIDTHS


@reusing_names
def test_row_reuses_its_residual_until_its_uses_are_spent(name: str) -> None:
    policy, row = REUSING[name]
    decisions = [RULES[name].plan(replace(row, num_reuses=uses), policy).decision for uses in (None, 0, 1, 2)]
    assert decisions == [Decision.RUN, Decision.REUSE, Decision.REUSE, Decision.RUN]


@reusing_names
@pytest.mark.parametrize(
    ("step", "decision"),
    [(0, Decision.RUN), (2, Decision.RUN), (3, Decision.REUSE), (6, Decision.REUSE), (7, Decision.RUN)],
)
def test_protected_steps_run_in_full_where_others_reuse(name: str, step: int, decision: Decision) -> None:
    policy, row = REUSING[name]
    protecting: Any = replace(policy, **{"protected_first": 3, "protected_last": 1})
    plan = RULES[name].plan(replace(row, step=step), protecting)
    assert (plan.decision, plan.mlp_width) == (decision, 1.0)


@reusing_names
def test_residual_is_kept_for_a_later_step_alone(name: str) -> None:
    policy, row = REUSING[name]
    running = replace(row, num_reuses=None)
    assert RULES[name].plan(running, policy).keeps_residual
    assert not RULES[name].plan(replace(running, next_step=8), policy).keeps_residual


@names
@given(data=st.data(), row=row_views())
def test_only_blocks_that_run_keep_their_residual(name: str, data: st.DataObject, row: RowView) -> None:
    plan = RULES[name].plan(row, data.draw(POLICIES[name]))
    assert plan.decision is Decision.RUN or not plan.keeps_residual


@names
@given(data=st.data(), row=row_views())
def test_plan_that_does_not_reuse_is_the_same_without_the_residual(
    name: str, data: st.DataObject, row: RowView
) -> None:
    """A failed step is repeated without the residuals of blocks that ran in it."""
    policy = data.draw(POLICIES[name])
    plan = RULES[name].plan(row, policy)
    assert plan.decision is Decision.REUSE or RULES[name].plan(replace(row, num_reuses=None), policy) == plan


@reusing_names
@given(data=st.data(), row=row_views())
def test_no_residual_is_kept_that_may_never_be_used(name: str, data: st.DataObject, row: RowView) -> None:
    policy: Any = data.draw(POLICIES[name])
    assert not RULES[name].plan(row, replace(policy, max_reuses=0)).keeps_residual


@names
@given(data=st.data())
def test_policy_survives_its_entry(name: str, data: st.DataObject) -> None:
    policy = data.draw(POLICIES[name])
    assert policy_of(policy_entry(policy)) == policy


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"rule": "nobody's", "policy": {}}, "there is no rule 'nobody's'; there are: dense, router"),
        ({"policy": {}}, "there is no rule 'None'"),
        ({"rule": "dense", "policy": {"skip_threshold": 0.5}}, "skip_threshold"),
        ({"rule": "router", "policy": {"width": 0.5}}, "width"),
        ({"rule": "router", "policy": None}, "do not fit"),
    ],
)
def test_entry_of_no_policy_is_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        policy_of(entry)


@names
def test_ladder_has_policies_of_its_own_rule_alone(name: str) -> None:
    policies = ladder(name, list(LIGHT.values()))
    assert {policy.rule for policy in policies} <= {name}
    assert bool(policies) == (name != "dense")
    assert len(set(policies)) == len(policies)


@names
@edits
def test_rule_that_leaves_nothing_out_equals_dense_bit_for_bit(
    name: str,
    is_edit: bool,
    engine: Engine,
    ask: Callable[..., GenerationRequest],
    edited: Callable[..., dict[str, Any]],
    denoise: Callable[..., DenoiseState],
) -> None:
    request = ask(num_inference_steps=5, height=80, **edited(has_mask=True) if is_edit else {})
    elastic = denoise(engine, request, point(EVERYTHING[name]))
    assert torch.equal(elastic.latents, denoise(engine, request).latents)
    assert elastic.summary().compute_ratio == 1


@names
@edits
def test_counted_compute_is_that_of_the_decisions(
    name: str,
    is_edit: bool,
    open_engine: Engine,
    ask: Callable[..., GenerationRequest],
    guided: Callable[..., dict[str, Any]],
    edited: Callable[..., dict[str, Any]],
    denoise: Callable[..., DenoiseState],
) -> None:
    request = ask(num_inference_steps=6, **guided(), **edited() if is_edit else {})
    state = denoise(open_engine, request, point(LIGHT[name]))
    summary = state.summary()
    costs = {row.branch: row.costs for row in state.rows}
    assert summary.decisions is not None
    ran = sum(costs[e.branch][e.block].at_width(e.mlp_width) for e in summary.decisions if e.decision is Decision.RUN)
    ran += state.num_steps * sum(cost.always for branch in costs.values() for cost in branch.values())
    dense = state.num_steps * sum(cost.dense for branch in costs.values() for cost in branch.values())
    assert summary.compute_ratio == pytest.approx(ran / dense, rel=1e-9)
    assert (summary.compute_ratio == 1) == (name == "dense")
    assert name == "dense" or summary.compute_ratio < 0.9
