"""From figures per prompt and per round to a contender's frontier, with bootstrap intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.table import TableRow

Floats = NDArray[np.float64]

QUALITIES = (0.995, 0.99, 0.98, 0.97, 0.95, 0.94)
_NUM_RESAMPLES = 1000
_SPREAD = (2.5, 97.5)
"""Percentiles of a 95 % interval."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure, and its bootstrap interval of 95 %."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One setting: quality per prompt, and denoise time over the stock loop's per round."""

    quality: Floats
    time_ratios: Floats


class Bootstrap:
    """Resamples prompts and rounds. All contenders share the resampled prompts, so that differences are paired."""

    def __init__(self, num_prompts: int, num_resamples: int = _NUM_RESAMPLES) -> None:
        self._rng = np.random.default_rng(0)
        self._prompts = self._rng.integers(num_prompts, size=(num_resamples, num_prompts))

    def mean_quality(self, measured: Measured) -> tuple[float, Floats]:
        """The mean over prompts, and that of each resample `(resamples,)`."""
        return float(measured.quality.mean()), measured.quality[self._prompts].mean(axis=1)

    def tenth_percentile(self, measured: Measured) -> tuple[float, Floats]:
        resampled = np.percentile(measured.quality[self._prompts], 10, axis=1)
        return float(np.percentile(measured.quality, 10)), np.asarray(resampled)

    def median_time(self, measured: Measured) -> tuple[float, Floats]:
        """The median over rounds, and that of each resample `(resamples,)`."""
        ratios = measured.time_ratios
        chosen = self._rng.integers(len(ratios), size=(len(self._prompts), len(ratios)))
        return float(np.median(ratios)), np.median(ratios[chosen], axis=1)

    def times_for(self, settings: Sequence[Measured], wanted: Sequence[float]) -> tuple[Floats, Floats]:
        """`time_for` of a contender for each wanted quality `(wanted,)`, and of each resample `(resamples, wanted)`."""
        times, resampled_times = zip(*map(self.median_time, settings), strict=True)
        means, resampled_means = zip(*map(self.mean_quality, settings), strict=True)
        per_resample = zip(np.stack(resampled_times, axis=1), np.stack(resampled_means, axis=1), strict=True)
        return (
            time_for(np.array(times), np.array(means), wanted),
            np.stack([time_for(own_times, own_means, wanted) for own_times, own_means in per_resample]),
        )


def estimate(value: float, resampled: Floats) -> Estimate:
    low, high = np.percentile(resampled, _SPREAD)
    return Estimate(value, float(low), float(high))


def frontier(times: Floats, qualities: Floats) -> tuple[Floats, Floats]:
    """Times and qualities of the settings that no other beats in both, and of the stock loop, both ascending.

    The stock loop has time 1 and quality 1. It is a setting of every contender: to leave the model as it is.
    """
    times, qualities = np.append(times, 1.0), np.append(qualities, 1.0)
    order = np.lexsort((-qualities, times))
    times, qualities = times[order], qualities[order]
    best_before = np.maximum.accumulate(np.concatenate(([-np.inf], qualities[:-1])))
    kept = qualities > best_before
    return times[kept], qualities[kept]


def time_for(times: Floats, qualities: Floats, wanted: Sequence[float]) -> Floats:
    """Least time for a mean quality of at least each of `wanted`, by straight lines between points of the frontier.

    Under the lowest quality measured it is the time of the fastest setting, an upper bound.
    """
    kept_times, kept_qualities = frontier(times, qualities)
    return np.interp(wanted, kept_qualities, kept_times)


def headline(by_contender: Mapping[str, Sequence[Measured]], ours: str, num_prompts: int) -> list[TableRow]:
    """For each contender and quality: the time, and the time over that of the contender `ours`, with intervals.

    `is_upper_bound` says that even the fastest setting is better than that. Without `ours` the ratios are None.
    """
    bootstrap = Bootstrap(num_prompts)
    times = {name: bootstrap.times_for(settings, QUALITIES) for name, settings in by_contender.items()}
    reference = times.get(ours)
    rows: list[TableRow] = []
    for name, (values, resampled) in times.items():
        lowest = min(float(setting.quality.mean()) for setting in by_contender[name])
        for index, quality in enumerate(QUALITIES):
            time = estimate(values[index], resampled[:, index])
            row: TableRow = {"contender": name, "quality": quality, "is_upper_bound": quality < lowest}
            row |= {"time": time.value, "time_low": time.low, "time_high": time.high}
            row |= dict.fromkeys(("over_ours", "over_ours_low", "over_ours_high"))
            if reference is not None:
                ratio = estimate(values[index] / reference[0][index], resampled[:, index] / reference[1][:, index])
                row |= {"over_ours": ratio.value, "over_ours_low": ratio.low, "over_ours_high": ratio.high}
            rows.append(row)
    return rows
