"""Learns how a model's steps can be forecast: records dense trajectories, and follows the schedules planned on them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from models.curve import ComputedSteps, CurvePoint
from models.engine import Engine
from models.rules.dense import DensePolicy
from models.rules.forecast import MAX_CONDITIONALS, MAX_VELOCITIES, Array, ForecastTable, fit_weights
from models.state import DenoiseState, Velocity

BATCH_SIZE = 8
_GROWTH_SHARES = (0.05, 0.1, 0.15, 0.25, 0.4, 0.6)
"""Where along the schedule the growth of errors is measured. It is interpolated elsewhere."""
_NUM_GROWTH = 2
"""Trajectories on which it is measured."""

Advance = Callable[[int], object]
"""Is told of so many computed steps, one for each state."""


@dataclass(frozen=True, slots=True)
class Trajectories:
    """Dense trajectories of `states`, which are done.

    `latents` is `(steps + 1, states, tokens, channels)`, `velocities` and `conditionals` `(steps, ...)`.
    """

    states: Sequence[DenoiseState]
    latents: Tensor
    velocities: Tensor
    conditionals: Tensor | None


def record(engine: Engine, states: Sequence[DenoiseState], advance: Advance) -> Trajectories:
    """Run `states` densely from their start to their end."""
    latents, velocities = [_latents(states)], []
    while not states[0].is_done:
        found = _velocities(engine, states, advance)
        for state, velocity in zip(states, found, strict=True):
            state.complete_step(state.moved(velocity))
        velocities.append(found)
        latents.append(_latents(states))
    guided = torch.stack([torch.cat([velocity.guided for velocity in found]).float() for found in velocities])
    conditionals = [[v.conditional for v in found if v.conditional is not None] for found in velocities]
    return Trajectories(
        states,
        torch.stack(latents),
        guided,
        torch.stack([torch.cat(found).float() for found in conditionals]) if conditionals[0] else None,
    )


def learn(
    engine: Engine,
    start: Callable[[], list[DenoiseState]],
    trajectories: Trajectories,
    nums_computed: Sequence[int],
    bar: "tqdm[None]",
) -> ForecastTable:
    """The table of `trajectories`, with weights fitted for the schedules of so many computed steps.

    `start` makes the states of the trajectories anew. Weights are fitted in closed loop: at each computed step, to the
    latents that the forecasts so far have led to, aiming at the dense trajectory.
    """
    sigmas = trajectories.states[0].sigmas.double().numpy()
    known = [trajectories.velocities, trajectories.latents]
    if trajectories.conditionals is not None:
        known.append(trajectories.conditionals)
    flat = torch.cat([part.flatten(1) for part in known])
    gram = (flat @ flat.T).double().cpu().numpy() / trajectories.latents[0].numel()
    growth = measure_growth(engine, start()[:_NUM_GROWTH], trajectories, bar.update)
    fitted: dict[tuple[int, int, int, int], Array] = {}
    table = ForecastTable(sigmas, gram, growth, fitted)
    states = with_forecasts(start(), table)

    def fit(at: Sequence[DenoiseState], velocities: Sequence[Velocity], end: int) -> None:
        recent = (*at[0].computed[1 - MAX_VELOCITIES :], at[0].step_index)
        gap = (*(-1,) * (MAX_VELOCITIES - len(recent)), *recent, end)
        fitted[gap[0], gap[1], gap[2], gap[3]] = _fit_closed_loop(at, velocities, trajectories.latents[end])

    for _ in follow(engine, states, nums_computed, bar.update, on_gap=fit):
        pass
    return table


def with_forecasts(states: list[DenoiseState], table: ForecastTable) -> list[DenoiseState]:
    """Let `states` of one schedule, at their start, forecast by `table`."""
    forecaster = table.forecaster(states[0].sigmas.double().numpy(), has_conditionals=len(states[0].rows) > 1)
    for state in states:
        state.forecaster = forecaster
    return states


def follow(
    engine: Engine,
    states: Sequence[DenoiseState],
    nums_computed: Sequence[int],
    advance: Advance,
    on_gap: Callable[[Sequence[DenoiseState], Sequence[Velocity], int], None] = lambda states, velocities, end: None,
) -> Iterator[tuple[int, list[DenoiseState]]]:
    """Follow the schedules of so many computed steps from the start of `states`; yields each with its done states.

    What schedules have in common runs once. `on_gap` gets the states before each gap, with their velocities and the
    step at which the gap ends.
    """
    yield from _follow(engine, states, _schedules(states[0], nums_computed), advance, on_gap)


def steps_to_follow(state: DenoiseState, nums_computed: Sequence[int]) -> int:
    """How many steps `follow` computes for each state."""
    schedules = _schedules(state, nums_computed).values()
    return len({tuple(schedule[:length]) for schedule in schedules for length in range(1, len(schedule))})


def _schedules(state: DenoiseState, nums_computed: Sequence[int]) -> dict[int, list[int]]:
    """The steps to compute for each number of them, and the end."""
    assert state.forecaster is not None
    return {num: [*state.forecaster.schedule(num), state.num_steps] for num in nums_computed}


def _follow(
    engine: Engine,
    states: Sequence[DenoiseState],
    schedules: Mapping[int, Sequence[int]],
    advance: Advance,
    on_gap: Callable[[Sequence[DenoiseState], Sequence[Velocity], int], None],
) -> Iterator[tuple[int, list[DenoiseState]]]:
    velocities = _velocities(engine, states, advance)
    depth = len(states[0].computed) + 1
    by_end: dict[int, dict[int, Sequence[int]]] = {}
    for num, schedule in schedules.items():
        by_end.setdefault(schedule[depth], {})[num] = schedule
    for end, chosen in by_end.items():
        on_gap(states, velocities, end)
        forks = [state.fork() for state in states]
        for fork, velocity in zip(forks, velocities, strict=True):
            fork.point = forecast_point(next(iter(chosen)), fork)
            fork.complete_step(fork.moved(velocity))
        if forks[0].is_done:
            yield next(iter(chosen)), forks
        else:
            yield from _follow(engine, forks, chosen, advance, on_gap)


def forecast_point(num_computed: int, state: DenoiseState) -> CurvePoint:
    """A point that computes so many steps of this state's schedule densely, before it is measured."""
    share = num_computed / state.num_steps
    steps = ComputedSteps(num_computed, state.request.num_inference_steps)
    return CurvePoint(DensePolicy(), share, share, 0.0, 0.0, steps=steps)


def learning_steps(num_steps: int, num_trajectories: int, num_followed: int) -> int:
    """Steps that recording and learning compute, if following all schedules takes `num_followed`."""
    growth = sum(num_steps - 1 - step for step in _growth_steps(num_steps))
    return num_trajectories * (num_steps + num_followed) + _NUM_GROWTH * growth


def _growth_steps(num_steps: int) -> list[int]:
    return sorted({max(1, round(share * num_steps)) for share in _GROWTH_SHARES} & {*range(1, num_steps)})


def measure_growth(
    engine: Engine, states: Sequence[DenoiseState], trajectories: Trajectories, advance: Advance
) -> Array:
    """The factor by which a squared error of the latents at each level grows until the end, `(steps + 1,)`.

    The latents of the first trajectories are led astray as by repeating the velocity before, and run on densely.
    `states` are those trajectories at their start.
    """
    num_steps, sigmas = states[0].num_steps, states[0].sigmas
    levels, factors = [], []
    for step in _growth_steps(num_steps):
        change = trajectories.velocities[step - 1] - trajectories.velocities[step]
        wrong = (sigmas[step + 1] - sigmas[step]) * change[: len(states)]
        astray = [state.fork() for state in states]
        for i, state in enumerate(astray):
            state.latents = (trajectories.latents[step + 1, i] + wrong[i])[None].to(state.latents)
            state.step_index = step + 1
        while not astray[0].is_done:
            for state, velocity in zip(astray, _velocities(engine, astray, advance), strict=True):
                state.complete_step(state.moved(velocity))
        error = _latents(astray) - trajectories.latents[-1, : len(states)]
        levels.append(step + 1)
        factors.append(math.log(float(error.square().sum() / wrong.square().sum())))
    return np.exp(np.interp(np.arange(num_steps + 1), [*levels, num_steps], [*factors, 0.0]))


def _fit_closed_loop(states: Sequence[DenoiseState], velocities: Sequence[Velocity], target: Tensor) -> Array:
    """The weights that lead `states` nearest to `target` `(states, tokens, channels)`."""
    histories = [[now, *state.velocities[: MAX_VELOCITIES - 1]] for state, now in zip(states, velocities, strict=True)]
    ages = range(len(histories[0]))
    guided = [torch.cat([history[age].guided for history in histories]) for age in ages]
    conditionals = [[h[age].conditional for h in histories] for age in ages[:MAX_CONDITIONALS]]
    conditional = [torch.cat([c for c in of_age if c is not None]) for of_age in conditionals if of_age[0] is not None]
    latents = _latents(states)
    known = torch.stack([*guided, latents, *conditional]).float().flatten(1).double()
    wanted = (target.to(latents) - latents).flatten().double()
    products = (known @ wanted).cpu().numpy()[:, None]
    weights = fit_weights((known @ known.T).cpu().numpy(), products, len(guided), len(conditional))
    fitted: Array = weights[:, 0]
    return fitted


def _velocities(engine: Engine, states: Sequence[DenoiseState], advance: Advance) -> list[Velocity]:
    found: list[Velocity] = []
    for first in range(0, len(states), BATCH_SIZE):
        batch = states[first : first + BATCH_SIZE]
        found += engine.velocities(batch)
        advance(len(batch))
    return found


def _latents(states: Sequence[DenoiseState]) -> Tensor:
    return torch.cat([state.latents for state in states]).float()
