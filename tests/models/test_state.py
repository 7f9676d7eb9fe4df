from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.budget import resolve
from models.curve import EXACT, CurvePoint, Preset
from models.engine import Engine
from models.errors import InvalidRequest
from models.families.family import Family
from models.report import Decision
from models.request import ComputeBudget, GenerationRequest, LatencyBudget, PresetBudget
from models.rules.residual_cache import ResidualCachePolicy
from models.rules.router import RouterPolicy
from models.state import DenoiseState

Ask = Callable[..., GenerationRequest]
Guided = Callable[..., dict[str, Any]]
Denoise = Callable[..., DenoiseState]

ROUNDING = 1 + 1e-7
"""Every step may overdraw what is left by a billionth."""


def test_summary_before_the_first_step_tells_the_plan(engine: Engine, ask: Ask) -> None:
    summary = engine.start(ask(budget=PresetBudget(Preset.BALANCED))).summary()
    assert (summary.rule, summary.compute_ratio, summary.compute_ratio_predicted) == ("router", 0, 0.5)
    assert (summary.skip_threshold_first, summary.skip_threshold_last) == (0.5, 0.5)
    assert (summary.num_run, summary.num_skipped, summary.num_reused, summary.mean_mlp_width) == (0, 0, 0, 1)
    assert (summary.quality_applied, summary.num_inference_steps, summary.decisions) == (0.8, 4, ())


def test_summary_counts_every_block_of_every_step_and_branch(
    engine: Engine, model: str, ask: Ask, guided: Guided, denoise: Denoise
) -> None:
    request = ask(budget=PresetBudget(Preset.BALANCED), num_inference_steps=5, **guided())
    summary = denoise(engine, request).summary()
    assert summary.decisions is not None
    assert [(e.step, e.branch, e.block) for e in summary.decisions] == [
        (step, branch, block)
        for step in range(5)
        for branch in ("cond", "uncond")
        for block in engine.cards[model].blocks
    ]
    counts = [sum(e.decision is decision for e in summary.decisions) for decision in Decision]
    assert [summary.num_run, summary.num_skipped, summary.num_reused] == counts
    widths = [e.mlp_width for e in summary.decisions if e.decision is Decision.RUN]
    assert summary.mean_mlp_width == pytest.approx(sum(widths) / len(widths))


def test_trace_is_given_only_where_it_was_asked_for(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    assert denoise(engine, ask(num_inference_steps=1, wants_trace=False)).summary().decisions is None


def test_compute_ratio_is_of_the_steps_taken_so_far(engine: Engine, ask: Ask) -> None:
    state = engine.start(ask())
    for _ in range(3):
        engine.step([state])
        assert state.summary().compute_ratio == 1


@pytest.mark.parametrize("has_guidance", [False, True], ids=["one branch", "two branches"])
def test_expected_runs_begin_with_the_curve_and_follow_the_requests_own_decisions(
    engine: Engine, model: str, ask: Ask, guided: Guided, has_guidance: bool
) -> None:
    blocks = engine.cards[model].blocks
    num_rows = 1 + has_guidance
    branches = guided() if has_guidance else {}
    state = engine.start(ask(budget=PresetBudget(Preset.BALANCED), num_inference_steps=30, **branches))
    assert state.expected_runs == [0.5 * num_rows] * len(blocks)
    while not state.is_done:
        engine.step([state])
    decisions = state.summary().decisions
    assert decisions is not None
    for block, expected in zip(blocks, state.expected_runs, strict=True):
        ran = [
            sum(e.decision is Decision.RUN for e in decisions if (e.block, e.step) == (block, step))
            for step in range(30)
        ]
        mean = 0.5 * num_rows
        for runs in ran:
            mean = mean * 2 / 3 + runs / 3
        assert expected == pytest.approx(mean)
    assert len(set(state.expected_runs)) > 1


def test_expected_runs_are_all_at_exact_and_those_of_a_cap(engine: Engine, ask: Ask) -> None:
    state = engine.start(ask())
    engine.step([state])
    assert set(state.expected_runs) == {1.0}
    assert set(engine.start(ask(budget=ComputeBudget(0.3))).expected_runs) == {0.3}
    state = engine.start(ask(budget=PresetBudget(Preset.BALANCED)))
    engine.step([state])
    state.move_to(EXACT)
    assert set(state.expected_runs) == {1.0}


@pytest.mark.parametrize("cap", [0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("has_guidance", [False, True], ids=["one branch", "two branches"])
def test_compute_is_never_over_the_cap(
    engine: Engine, ask: Ask, guided: Guided, denoise: Denoise, cap: float, has_guidance: bool
) -> None:
    request = ask(budget=ComputeBudget(cap), num_inference_steps=6, **guided() if has_guidance else {})
    assert denoise(engine, request).summary().compute_ratio <= cap * ROUNDING


@st.composite
def curves(draw: st.DrawFn) -> list[CurvePoint]:
    """Curves that say anything at all about what a policy costs: the cap must hold even where they are wrong."""
    ratios = sorted(draw(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3, unique=True)), reverse=True)
    protected = {"protected_first": st.integers(0, 2), "protected_last": st.integers(0, 2)}
    routed = st.builds(
        RouterPolicy,
        skip_threshold=st.floats(0, 1),
        reuse_band=st.sampled_from([0.0, 0.3]),
        max_reuses=st.integers(0, 3),
        width_bias=st.floats(-3, 3),
        **protected,
    )
    cached = st.builds(
        ResidualCachePolicy, residual_threshold=st.floats(0, 2), max_reuses=st.integers(0, 3), **protected
    )
    policies = draw(st.sampled_from([routed, cached]))
    return [EXACT, *(CurvePoint(draw(policies), ratio, ratio, ratio) for ratio in ratios)]


@settings(max_examples=25)
@given(curve=curves(), cap=st.floats(0.01, 1), steps=st.integers(1, 4))
def test_compute_is_never_over_the_cap_whatever_the_curve_says(
    open_engine: Engine, family: Family, ask: Ask, curve: list[CurvePoint], cap: float, steps: int
) -> None:
    budget = ComputeBudget(cap)
    request, point = ask(budget=budget, num_inference_steps=steps), resolve(budget, curve)
    uncapped = family.start(request, curve, point)
    if cap < sum(cost.always for cost in uncapped.rows[0].costs.values()) / uncapped.dense_flops:
        with pytest.raises(InvalidRequest, match=r"compute_ratio 0\.0\d+ is not possible: .*; try 0\.0"):
            family.start(request, curve, point, cap)
        return
    state = family.start(request, curve, point, cap)
    while not state.is_done:
        open_engine.step([state])
    assert state.summary().compute_ratio <= cap * ROUNDING


@pytest.mark.parametrize("cap", [0.25, 0.4, 0.6])
def test_cap_is_not_met_by_dropping_the_last_steps(engine: Engine, ask: Ask, denoise: Denoise, cap: float) -> None:
    state = denoise(engine, ask(budget=ComputeBudget(cap), num_inference_steps=8))
    decisions = state.summary().decisions
    assert decisions is not None
    num_run = [sum(e.step == step and e.decision is Decision.RUN for e in decisions) for step in range(8)]
    assert sum(num_run[-2:]) > 0
    assert state.summary().compute_ratio > cap / 2


def test_cap_is_shared_by_the_branches(engine: Engine, ask: Ask, guided: Guided, denoise: Denoise) -> None:
    state = denoise(engine, ask(budget=ComputeBudget(0.4), **guided()))
    assert state.rows[0].spent_flops != state.rows[1].spent_flops
    assert state.spent_flops <= 0.4 * 4 * state.dense_flops * ROUNDING


def test_thresholds_move_with_what_is_left(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    state = denoise(engine, ask(budget=ComputeBudget(0.4), num_inference_steps=8))
    summary = state.summary()
    assert (summary.skip_threshold_first, summary.skip_threshold_last) == (state.thresholds[0], state.thresholds[-1])
    assert len(set(state.thresholds)) > 2


def test_cap_is_refused_where_nothing_was_calibrated(plain_engine: Engine) -> None:
    (card,) = plain_engine.cards.values()
    with pytest.raises(InvalidRequest, match=r"compute_ratio 0\.5 is not possible"):
        resolve(ComputeBudget(0.5), card.curve)


def test_state_that_moves_takes_each_step_where_it_is_then(engine: Engine, ask: Ask) -> None:
    cheap = CurvePoint(RouterPolicy(skip_threshold=0.4, reuse_band=0.3, max_reuses=2), 0.4, 0.5, 0.6)
    state = engine.start(ask(num_inference_steps=4, budget=LatencyBudget(1.0)))
    alone = engine.start(ask(num_inference_steps=4), EXACT)
    for step, point in enumerate((EXACT, EXACT, cheap, EXACT)):
        state.move_to(point)
        engine.step([state])
        engine.step([alone])
        if step < 2:
            assert torch.equal(state.latents, alone.latents)
    summary = state.summary()
    assert summary.quality_applied == pytest.approx((1 + 1 + 0.6 + 1) / 4)
    assert summary.compute_ratio_predicted == pytest.approx((1 + 1 + 0.4 + 1) / 4)
    assert summary.compute_ratio < alone.summary().compute_ratio == pytest.approx(1)


def test_companions_do_not_matter_to_a_state_that_moves(engine: Engine, ask: Ask) -> None:
    cheap = CurvePoint(RouterPolicy(skip_threshold=0.4, reuse_band=0.3, max_reuses=2), 0.4, 0.5, 0.6)
    states = [engine.start(ask(num_inference_steps=4, budget=LatencyBudget(1.0))) for _ in range(2)]
    companion = engine.start(ask(num_inference_steps=4, seed=9), cheap)
    for point in (cheap, EXACT, cheap, cheap):
        for state in states:
            state.move_to(point)
        engine.step([states[0]])
        engine.step([companion, states[1]])
    assert states[0].summary() == states[1].summary()
    torch.testing.assert_close(states[1].latents, states[0].latents, rtol=0, atol=1e-5)
