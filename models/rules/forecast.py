"""Forecast steps: between computed steps the latents go on along velocities that calibration learned to foretell.

From one computed step to the next, the latents change by a linear combination of the latents and of the velocities at
the last three computed steps. With true guidance, the conditional branch's last two velocities take part as well. The
weights are least squares over dense trajectories of calibration prompts (cf. learned linear predictors in L2P,
https://arxiv.org/abs/2604.26365). Dynamic programming over predicted errors chooses which steps are computed (cf.
DPCache, https://arxiv.org/abs/2602.22654).

Noise levels may rise or fall along a trajectory. Nothing here needs torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from models.errors import WeightsError

Array = NDArray[np.float64]
Gap = tuple[int, int, int, int]
"""The last three computed steps, oldest first, -1 where there was none, and the step the latents go on to."""

MAX_VELOCITIES = 3
MAX_CONDITIONALS = 2
_RIDGE = 1e-4
"""Of normalised features."""


class Weights(NamedTuple):
    """The change of the latents over a gap, as weights of what is known, the newest first."""

    latents: float
    velocities: Sequence[float]
    conditionals: Sequence[float]


def fit_weights(gram: Array, products: Array, num_velocities: int, num_conditionals: int) -> Array:
    """Least squares in what is known: velocities, then the latents, then conditional velocities, the newest first.

    `gram` `(known, known)` has their inner products, `products` `(known, targets)` those with each target. Returns
    `(known, targets)`. The fit is ridged in features that are nearly independent: the newest velocity and differences.
    """
    features = _features(num_velocities, num_conditionals)
    normal = features @ gram @ features.T
    scale = np.sqrt(np.maximum(np.diag(normal), 1e-20))
    ridged = normal / scale[:, None] / scale + _RIDGE * np.eye(len(normal))
    solved: Array = np.linalg.solve(ridged, features @ products / scale[:, None]) / scale[:, None]
    return features.T @ solved


def _features(num_velocities: int, num_conditionals: int) -> Array:
    rows = np.eye(num_velocities + 1 + num_conditionals)
    for first, count in ((0, num_velocities), (num_velocities + 1, num_conditionals)):
        for age in range(count - 1, 0, -1):
            rows[first + age] = rows[first + age - 1] - rows[first + age]
    return rows


@dataclass(frozen=True, slots=True)
class ForecastTable:
    """What calibration learned of a model's dense trajectories.

    `sigmas` `(steps + 1,)` are the noise levels of the calibrated schedule. `gram` has the inner products of the
    trajectories' velocities `(steps,)`, latents `(steps + 1,)` and, with true guidance, conditional velocities
    `(steps,)`, in this order. `growth` `(steps + 1,)` is the factor by which a squared error of the latents at a step
    grows until the end. `fitted` has the weights for the gaps of calibrated schedules, fitted to latents that forecasts
    had led to; for all other gaps they follow from `gram`.
    """

    sigmas: Array
    gram: Array
    growth: Array
    fitted: Mapping[Gap, Array] = field(default_factory=dict)

    @property
    def has_conditionals(self) -> bool:
        return len(self.gram) == 3 * self.num_steps + 1

    @property
    def num_steps(self) -> int:
        return len(self.sigmas) - 1

    def forecaster(self, sigmas: Array, *, has_conditionals: bool) -> "Forecaster":
        """The forecaster of a schedule `(steps + 1,)` of noise levels.

        Other schedules than the calibrated one are interpolated in the noise level. Without calibrated conditional
        velocities none are used.
        """
        has_conditionals = has_conditionals and self.has_conditionals
        is_same = len(sigmas) == len(self.sigmas) and np.allclose(sigmas, self.sigmas, atol=1e-5)
        at_steps = _interpolation(sigmas[:-1], self.sigmas[:-1])
        at_levels = _interpolation(sigmas, self.sigmas)
        latents = np.zeros((len(sigmas), len(self.gram)))
        latents[:, self.num_steps : 2 * self.num_steps + 1] = at_levels
        velocities = np.zeros((len(sigmas) - 1, len(self.gram)))
        velocities[:, : self.num_steps] = at_steps
        conditionals = np.zeros((len(sigmas) - 1 if has_conditionals else 0, len(self.gram)))
        if has_conditionals:
            conditionals[:, 2 * self.num_steps + 1 :] = at_steps
        # How far the latents of this schedule have come at each level.
        travelled = np.vstack((0 * velocities[:1], np.cumsum(np.diff(sigmas)[:, None] * velocities, axis=0)))
        known = np.vstack((velocities, latents, conditionals, travelled))
        return Forecaster(
            num_steps=len(sigmas) - 1,
            has_conditionals=has_conditionals,
            gram=known @ self.gram @ known.T,
            growth=np.exp(at_levels @ np.log(self.growth)),
            fitted=self.fitted if is_same and has_conditionals == self.has_conditionals else {},
        )


def _interpolation(wanted: Array, given: Array) -> Array:
    """The matrix that interpolates linearly from the levels `given`, which ascend or descend, to `wanted`."""
    order = np.argsort(given)
    columns = [np.interp(wanted, given[order], np.eye(len(given))[order, i]) for i in range(len(given))]
    return np.stack(columns, axis=1)


@dataclass(frozen=True)
class Forecaster:
    """Forecasts and plans for one schedule.

    `gram` has the inner products of its velocities `(steps,)`, latents `(steps + 1,)`, conditional velocities
    `(steps,)` if it has any, and of the way from the first latents to each level `(steps + 1,)`.
    """

    num_steps: int
    has_conditionals: bool
    gram: Array
    growth: Array
    fitted: Mapping[Gap, Array]

    def weights(self, computed: Sequence[int], end: int) -> Weights:
        """The weights of the gap that ends at step `end`. `computed` are the computed steps so far, the newest last."""
        recent = tuple(computed[-MAX_VELOCITIES:])
        gap = (*(-1,) * (MAX_VELOCITIES - len(recent)), *recent, end)
        weights = self.fitted.get((gap[0], gap[1], gap[2], gap[3]))
        if weights is None:
            weights = self._fit(recent, end - 1)[0][:, 0]
        count = len(recent)
        return Weights(float(weights[count]), weights[:count].tolist(), weights[count + 1 :].tolist())

    def next_step(self, computed: Sequence[int], num_left: int) -> int:
        """The best step to go on to, if `num_left` more steps are computed after the last of `computed`."""
        last, before = computed[-1], computed[-2] if len(computed) > 1 else -1
        num_left = min(num_left, self.num_steps - 1 - last)
        return int(self._plans[num_left][1][before + 1, last])

    def schedule(self, num_computed: int) -> list[int]:
        """The steps to compute, `num_computed` of them."""
        computed = [0]
        while len(computed) < num_computed:
            computed.append(self.next_step(computed, num_computed - len(computed)))
        return computed

    def num_needed(self, taken: int, computed: int) -> int:
        """How many of the last `taken` steps to compute, to end as near as with `computed` of all steps.

        That is, for a predicted error that is no larger.
        """
        allowed, first = self._plans[computed - 1][0][0, 0], self.num_steps - taken
        return next((k for k in range(1, taken) if self._plans[k - 1][0][0, first] <= allowed), taken)

    def _fit(self, recent: Sequence[int], first_end: int) -> tuple[Array, Array]:
        """Weights `(known, ends)` and squared errors `(ends,)` for all ends after `first_end`."""
        n, last = self.num_steps, recent[-1]
        newest_first = list(recent[::-1])
        conditionals = [2 * n + 1 + s for s in newest_first[:MAX_CONDITIONALS]] if self.has_conditionals else []
        known = np.array([*newest_first, n + last, *conditionals])
        travelled = len(self.gram) - n - 1
        ends, start = travelled + np.arange(first_end + 1, n + 1), travelled + last
        products = self.gram[np.ix_(known, ends)] - self.gram[known, start][:, None]
        gram = self.gram[np.ix_(known, known)]
        weights = fit_weights(gram, products, len(newest_first), len(conditionals))
        lengths = self.gram[ends, ends] - 2 * self.gram[ends, start] + self.gram[start, start]
        errors = lengths - 2 * (weights * products).sum(0) + (weights * (gram @ weights)).sum(0)
        return weights, np.maximum(errors, 0.0)

    @cached_property
    def _plans(self) -> list[tuple[Array, NDArray[np.intp]]]:
        """By the number of computed steps left: the least error `(before + 1, last)` and the next step that has it."""
        n = self.num_steps
        errors = np.full((n + 1, n, n + 1), np.inf)  # of the gap that ends at the third, after `before`, `last`
        for last in range(n):
            for before in range(-1, last):
                recent = (last,) if before < 0 else (before, last)
                errors[before + 1, last, last + 1 :] = self._fit(recent, last)[1] * self.growth[last + 1 :]
        plans = [(errors[:, :, n], np.full((n + 1, n), n))]
        for _ in range(1, n):
            total = errors[:, :, :n] + plans[-1][0][1:]
            plans.append((total.min(axis=2), total.argmin(axis=2)))
        return plans


def read_forecast_table(folder: Path) -> ForecastTable | None:
    """The table in a router folder, None if it has none. Raises WeightsError if it is malformed."""
    path = folder / "forecast.safetensors"
    if not path.exists():
        return None
    try:
        tensors: dict[str, Any] = load_file(path)
        sigmas, gram, growth = tensors["sigmas"], tensors["gram"], tensors["growth"]
        weights, counts = tensors["weights"], tensors["counts"]
        fitted = {
            (int(a), int(b), int(c), int(end)): row[:count]
            for (a, b, c, end), row, count in zip(tensors["gaps"], weights, counts, strict=True)
        }
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} can't be read: {error!r}; calibrate the model again") from error
    steps = len(sigmas) - 1
    if len(growth) != steps + 1 or gram.shape not in ((2 * steps + 1,) * 2, (3 * steps + 1,) * 2):
        raise WeightsError(f"{path} has {steps} steps, {len(growth)} factors of growth and products {gram.shape}")
    return ForecastTable(sigmas, gram, growth, fitted)


def write_forecast_table(folder: Path, table: ForecastTable) -> None:
    width = MAX_VELOCITIES + 1 + MAX_CONDITIONALS
    tensors: dict[str, NDArray[Any]] = {
        "sigmas": table.sigmas,
        "gram": table.gram,
        "growth": table.growth,
        "gaps": np.array(list(table.fitted), dtype=np.int32).reshape(-1, 4),
        "counts": np.array([len(row) for row in table.fitted.values()], dtype=np.int32),
        "weights": np.array([np.pad(row, (0, width - len(row))) for row in table.fitted.values()]).reshape(-1, width),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "forecast.safetensors")
