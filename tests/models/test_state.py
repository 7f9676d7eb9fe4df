from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.budget import resolve
from models.curve import EXACT, ComputedSteps, CurvePoint, Preset
from models.engine import Engine
from models.errors import InvalidRequest, OutOfDeviceMemory
from models.families.family import Family
from models.report import Decision
from models.request import ComputeBudget, GenerationRequest, LatencyBudget, PresetBudget
from models.rules.dense import DensePolicy
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
    assert (summary.num_forecast, summary.num_steps_computed, summary.num_steps_forecast) == (0, 0, 0)
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
    assert [summary.num_run, summary.num_skipped, summary.num_reused, summary.num_forecast] == counts
    widths = [e.mlp_width for e in summary.decisions if e.decision is Decision.RUN]
    assert summary.mean_mlp_width == pytest.approx(sum(widths) / len(widths))


FORECAST = CurvePoint(DensePolicy(), 0.375, 0.4, 0.8, 0.9, steps=ComputedSteps(3, 8))


def test_forecast_steps_are_part_of_the_summary_and_the_trace(
    engine: Engine, model: str, ask: Ask, guided: Guided, denoise: Denoise
) -> None:
    state = denoise(engine, ask(num_inference_steps=8, **guided()), FORECAST)
    summary, blocks = state.summary(), engine.cards[model].blocks
    assert (summary.rule, summary.num_steps_computed, summary.num_steps_forecast) == (
        "forecast",
        3,
        state.num_steps - 3,
    )
    assert summary.num_run == 3 * 2 * len(blocks)
    assert summary.num_forecast == (state.num_steps - 3) * 2 * len(blocks)
    assert summary.compute_ratio == pytest.approx(3 / state.num_steps)
    assert summary.decisions is not None
    assert [(e.step, e.branch, e.block) for e in summary.decisions] == [
        (step, branch, block) for step in range(state.num_steps) for branch in ("cond", "uncond") for block in blocks
    ]
    assert {e.step for e in summary.decisions if e.decision is not Decision.FORECAST} == {*state.computed}
    assert {e.mlp_width for e in summary.decisions if e.decision is Decision.FORECAST} == {0.0}


@pytest.mark.parametrize("computed", range(1, 9))
def test_so_many_steps_are_computed_as_the_point_says(engine: Engine, ask: Ask, computed: int) -> None:
    point = replace(FORECAST, steps=ComputedSteps(computed, 8))
    state = engine.start(ask(num_inference_steps=8), point)
    turns = 0
    while not state.is_done:
        assert state.num_computed_steps == min(computed, state.num_steps)
        engine.step([state])
        turns += 1
    assert turns == len(state.computed) == min(computed, state.num_steps)
    assert state.computed[0] == 0


def test_nearly_all_steps_computed_is_nearly_exact(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    request = ask(num_inference_steps=8)
    exact = denoise(engine, request, EXACT).latents
    errors = []
    for computed in (2, 4, 7):
        state = denoise(engine, request, replace(FORECAST, steps=ComputedSteps(computed, 8)))
        errors.append(float((state.latents - exact).norm() / exact.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


def test_all_steps_computed_is_exact_bit_for_bit(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    """Where a shorter schedule leaves nothing to forecast."""
    request = ask(num_inference_steps=3)
    point = FORECAST.at(3, 3, is_calibrated=False)
    assert point.is_exact
    assert torch.equal(denoise(engine, request, point).latents, denoise(engine, request, EXACT).latents)


@pytest.mark.parametrize("cap", [0.2, 0.4, 0.5, 0.7])
def test_cap_is_met_by_the_number_of_computed_steps(open_engine: Engine, family: Family, ask: Ask, cap: float) -> None:
    point = replace(FORECAST, steps=ComputedSteps(7, 8))
    state = family.start(ask(num_inference_steps=8, budget=ComputeBudget(cap)), [EXACT, point], point, cap)
    while not state.is_done:
        open_engine.step([state])
    assert len(state.computed) == int(cap * state.num_steps + 1e-9)
    assert state.summary().compute_ratio <= cap * ROUNDING


def test_cap_under_one_step_is_refused(family: Family, ask: Ask) -> None:
    with pytest.raises(InvalidRequest, match=r"compute_ratio 0\.05 is not possible: one of its steps .* try 0\.1"):
        family.start(ask(num_inference_steps=8, budget=ComputeBudget(0.05)), [EXACT, FORECAST], FORECAST, 0.05)


@pytest.mark.parametrize("moves", [(3, 8, 2, 8), (8, 3, 3, 3, 3), (2, 5, 8, 8, 8, 8), (0, 3, 0, 4, 4, 4)])
def test_plan_may_change_before_every_computed_step(
    open_engine: Engine, family: Family, ask: Ask, moves: tuple[int, ...]
) -> None:
    """0 stands for exact. The result stays near the exact one, and no step is computed twice."""
    points = [replace(FORECAST, steps=ComputedSteps(n, 8)) if n else EXACT for n in moves]
    request = ask(num_inference_steps=8, budget=LatencyBudget(1.0))
    state, exact = (family.start(request, [EXACT, FORECAST], point) for point in (points[0], EXACT))
    for turn in range(8):
        if not state.is_done:
            state.move_to(points[min(turn, len(points) - 1)])
            open_engine.step([state])
    while not exact.is_done:
        open_engine.step([exact])
    assert state.is_done
    assert sorted(set(state.computed)) == state.computed
    assert (state.latents - exact.latents).norm() < 0.5 * exact.latents.norm()


def test_point_for_a_longer_schedule_computes_one_step_more_and_is_not_calibrated() -> None:
    point = FORECAST.at(16, 3, is_calibrated=False)
    assert point.steps == ComputedSteps(4, 16)
    assert point.compute_ratio == pytest.approx(4 / 16)
    assert not point.is_calibrated
    assert FORECAST.at(8, 3, is_calibrated=True) == FORECAST


@given(
    left=st.integers(1, 8),
    done=st.integers(0, 8),
    point=st.sampled_from([EXACT, FORECAST, CurvePoint(RouterPolicy(), 0.5, 0.6, 0.9, 0.9)]),
)
def test_time_left_is_that_of_the_steps_still_to_compute(left: int, done: int, point: CurvePoint) -> None:
    expected = left * point.relative_seconds
    if point is FORECAST:
        expected = min(max(3 - done, 1), left) * 0.4 * 8 / 3
    assert point.dense_steps_left(left, done) == pytest.approx(expected)


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
    return [EXACT, *(CurvePoint(draw(routed), ratio, ratio, ratio, ratio) for ratio in ratios)]


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
    state = denoise(engine, ask(budget=ComputeBudget(0.4), num_inference_steps=12))
    summary = state.summary()
    assert (summary.skip_threshold_first, summary.skip_threshold_last) == (state.thresholds[0], state.thresholds[-1])
    assert len(set(state.thresholds)) > 2


def test_cap_is_refused_where_nothing_was_calibrated(plain_engine: Engine) -> None:
    (card,) = plain_engine.cards.values()
    with pytest.raises(InvalidRequest, match=r"compute_ratio 0\.5 is not possible"):
        resolve(ComputeBudget(0.5), card.curve)


def test_state_that_moves_takes_each_step_where_it_is_then(engine: Engine, ask: Ask) -> None:
    cheap = CurvePoint(RouterPolicy(skip_threshold=0.4, reuse_band=0.3, max_reuses=2), 0.4, 0.5, 0.6, 0.6)
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
    cheap = CurvePoint(RouterPolicy(skip_threshold=0.4, reuse_band=0.3, max_reuses=2), 0.4, 0.5, 0.6, 0.6)
    states = [engine.start(ask(num_inference_steps=4, budget=LatencyBudget(1.0))) for _ in range(2)]
    companion = engine.start(ask(num_inference_steps=4, seed=9), cheap)
    for point in (cheap, EXACT, cheap, cheap):
        for state in states:
            state.move_to(point)
        engine.step([states[0]])
        engine.step([companion, states[1]])
    assert states[0].summary() == states[1].summary()
    torch.testing.assert_close(states[1].latents, states[0].latents, rtol=0, atol=1e-5)


def test_forecast_that_failed_can_be_repeated(
    engine: Engine, ask: Ask, denoise: Denoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    request = ask(num_inference_steps=8)
    alone, state = denoise(engine, request, FORECAST), engine.start(request, FORECAST)
    engine.step([state])
    with monkeypatch.context() as patched:
        patched.setattr("models.state.linear_step", run_out_of_memory)
        with pytest.raises(OutOfDeviceMemory):
            engine.step([state])
    while not state.is_done:
        engine.step([state])
    assert state.summary() == alone.summary()
    assert torch.equal(state.latents, alone.latents)
