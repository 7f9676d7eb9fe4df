"""Forecasts on trajectories whose form is known, and the plans that follow from them."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import WeightsError
from models.rules.forecast import (
    Array,
    Forecaster,
    ForecastTable,
    fit_weights,
    read_forecast_table,
    write_forecast_table,
)


def table_of(velocities: Array, sigmas: Array, first: Array, conditionals: Array | None = None) -> ForecastTable:
    """The table of one trajectory; `velocities` is `(steps, size)`."""
    latents = np.vstack((first, first + np.cumsum(np.diff(sigmas)[:, None] * velocities, axis=0)))
    known = np.vstack((velocities, latents, *([] if conditionals is None else [conditionals])))
    return ForecastTable(sigmas, known @ known.T / velocities.shape[1], np.ones(len(sigmas)))


def smooth(num_steps: int, rng: np.random.Generator) -> ForecastTable:
    """Velocities that bend slowly, with a little noise."""
    sigmas = np.linspace(1, 0, num_steps + 1)
    parts = rng.normal(size=(4, 64)) * np.array([1, 0.5, 0.2, 0.02])[:, None]
    s = sigmas[:-1, None]
    velocities = parts[0] + s * parts[1] + np.sin(3 * s) * parts[2] + rng.normal(size=(num_steps, 64)) * 0.01
    return table_of(velocities, sigmas, rng.normal(size=64))


def follow(table: ForecastTable, forecaster: Forecaster, velocities: Array, first: Array, computed: list[int]) -> Array:
    """The last latents, when only the steps `computed` have velocities."""
    latents = first
    for i, end in enumerate([*computed[1:], forecaster.num_steps]):
        weights = forecaster.weights(computed[: i + 1], end)
        newest_first = [velocities[step] for step in computed[i::-1]]
        change = weights.latents * latents
        for weight, velocity in zip(weights.velocities, newest_first, strict=False):
            change = change + weight * velocity
        latents = latents + change
    return latents


@pytest.mark.parametrize("falls", [True, False], ids=["levels fall", "levels rise"])
def test_velocity_that_changes_evenly_is_forecast_exactly(falls: bool) -> None:
    rng = np.random.default_rng(0)
    sigmas = np.linspace(1, 0, 11) if falls else np.linspace(0, 1, 11)
    base, slope, first = rng.normal(size=(3, 500))
    velocities = base + sigmas[:-1, None] * slope
    table = table_of(velocities, sigmas, first)
    end = first + (np.diff(sigmas)[:, None] * velocities).sum(0)
    found = follow(table, table.forecaster(sigmas, has_conditionals=False), velocities, first, [0, 1, 4])
    assert np.linalg.norm(found - end) < 0.01 * np.linalg.norm(end - first)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), taken=st.integers(1, 9), computed=st.integers(1, 9))
def test_last_steps_need_so_many_computed_that_their_error_is_not_larger(seed: int, taken: int, computed: int) -> None:
    table = smooth(9, np.random.default_rng(seed))
    whole = table.forecaster(table.sigmas, has_conditionals=False)
    part = table.forecaster(table.sigmas[-taken - 1 :], has_conditionals=False)

    def error(forecaster: Forecaster, num_computed: int) -> float:
        return float(forecaster._plans[num_computed - 1][0][0, 0])

    needed = whole.num_needed(taken, computed)
    assert needed == taken or error(part, needed) <= error(whole, computed) * (1 + 1e-6)
    assert needed == 1 or error(part, needed - 1) >= error(whole, computed) * (1 - 1e-6)
    assert whole.num_needed(9, computed) <= computed


def test_schedule_of_all_steps_forecasts_nothing() -> None:
    table = smooth(8, np.random.default_rng(1))
    assert table.forecaster(table.sigmas, has_conditionals=False).schedule(8) == list(range(8))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), num_computed=st.integers(1, 6))
def test_schedule_is_the_best_of_all(seed: int, num_computed: int) -> None:
    """By the errors that it is planned on."""
    table = smooth(7, np.random.default_rng(seed))
    forecaster = table.forecaster(table.sigmas, has_conditionals=False)

    def error(schedule: tuple[int, ...]) -> float:
        total = 0.0
        for i, end in enumerate([*schedule[1:], 7]):
            recent = schedule[max(0, i - 1) : i + 1]
            total += float(forecaster._fit(recent, end - 1)[1][0])
        return total

    best = min(error((0, *rest)) for rest in combinations(range(1, 7), num_computed - 1))
    assert error(tuple(forecaster.schedule(num_computed))) == pytest.approx(best)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), computed=st.integers(1, 8), left=st.integers(0, 12))
def test_any_history_can_go_on_with_any_number_of_computed_steps(seed: int, computed: int, left: int) -> None:
    """A deadline or a cap may change the plan at any step."""
    rng = np.random.default_rng(seed)
    table = smooth(10, rng)
    forecaster = table.forecaster(table.sigmas, has_conditionals=False)
    history = [0, *sorted(rng.choice(range(1, 9), computed - 1, replace=False).tolist())]
    steps = [forecaster.next_step(history, left)]
    while steps[-1] < 10:
        history.append(steps[-1])
        steps.append(forecaster.next_step(history, left - len(steps)))
    assert steps == sorted(set(steps))
    assert len(steps) == 1 + min(left, 9 - history[computed - 1])


def test_weights_that_were_fitted_are_used_where_they_were_fitted() -> None:
    table = smooth(8, np.random.default_rng(2))
    fitted = ForecastTable(table.sigmas, table.gram, table.growth, {(-1, 0, 2, 5): np.array([1.0, 2.0, 3.0])})
    forecaster = fitted.forecaster(table.sigmas, has_conditionals=False)
    assert forecaster.weights([0, 2], 5) == (3.0, [1.0, 2.0], [])
    other = table.forecaster(table.sigmas, has_conditionals=False)
    for history, end in (([0, 2], 6), ([1, 2], 5), ([0, 1, 2], 5)):
        assert forecaster.weights(history, end) == other.weights(history, end)
    # On another schedule the same numbers of steps are other gaps.
    assert fitted.forecaster(np.linspace(1, 0, 11), has_conditionals=False).weights([0, 2], 5)[1] != [1.0, 2.0]


def test_other_schedules_are_interpolated_in_the_noise_level() -> None:
    rng = np.random.default_rng(3)
    base, slope, first = rng.normal(size=(3, 500))
    sigmas = np.linspace(1, 0, 21)
    table = table_of(base + sigmas[:-1, None] * slope, sigmas, first)
    others = np.linspace(1, 0, 11) ** 1.5
    velocities = base + others[:-1, None] * slope
    end = first + (np.diff(others)[:, None] * velocities).sum(0)
    found = follow(table, table.forecaster(others, has_conditionals=False), velocities, first, [0, 2, 5])
    assert np.linalg.norm(found - end) < 0.02 * np.linalg.norm(end - first)


def test_conditional_velocities_help_where_the_guided_one_follows_from_them() -> None:
    """The change over the gap is what the conditional branch says, not what the guided velocity says."""
    rng = np.random.default_rng(4)
    sigmas = np.linspace(1, 0, 9)
    told = rng.normal(size=(8, 300))
    velocities = np.vstack((rng.normal(size=(1, 300)), told[:-1]))
    table = table_of(velocities, sigmas, rng.normal(size=300), told)
    without = table.forecaster(sigmas, has_conditionals=False)._fit((2, 3), 4)[1]
    with_them = table.forecaster(sigmas, has_conditionals=True)._fit((2, 3), 4)[1]
    assert with_them[0] < 0.7 * without[0]
    assert len(table.forecaster(sigmas, has_conditionals=True).weights([2, 3], 5).conditionals) == 2


def test_conditional_velocities_that_were_not_calibrated_are_not_used() -> None:
    table = smooth(8, np.random.default_rng(5))
    assert table.forecaster(table.sigmas, has_conditionals=True).weights([0, 1, 2], 5).conditionals == []


def test_fit_finds_the_weights_of_what_it_knows() -> None:
    rng = np.random.default_rng(6)
    known = rng.normal(size=(6, 4000))
    weights = np.array([1.5, -0.5, 0.25, 0.1, 0.7, -0.3])
    found = fit_weights(known @ known.T, (known @ (weights @ known))[:, None], 3, 2)[:, 0]
    np.testing.assert_allclose(found, weights, atol=2e-3)


def test_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = smooth(6, np.random.default_rng(7))
    fitted = {(-1, -1, 0, 2): np.array([1.0, 2.0]), (0, 2, 3, 6): np.arange(6.0)}
    write_forecast_table(tmp_path, ForecastTable(table.sigmas, table.gram, table.growth, fitted))
    read = read_forecast_table(tmp_path)
    assert read is not None
    assert np.array_equal(read.sigmas, table.sigmas)
    assert np.array_equal(read.gram, table.gram)
    assert np.array_equal(read.growth, table.growth)
    assert {gap: row.tolist() for gap, row in read.fitted.items()} == {gap: row.tolist() for gap, row in fitted.items()}


def test_folder_without_a_table_has_none(tmp_path: Path) -> None:
    assert read_forecast_table(tmp_path) is None


@pytest.mark.parametrize("damage", ["cut", "other", "growth"])
def test_damaged_table_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    table = smooth(6, np.random.default_rng(8))
    if damage == "growth":
        table = ForecastTable(table.sigmas, table.gram, table.growth[:-1])
    write_forecast_table(tmp_path, table)
    path = tmp_path / "forecast.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    if damage == "other":
        path.write_text("not a table")
    with pytest.raises(WeightsError, match=r"forecast\.safetensors"):
        read_forecast_table(tmp_path)
