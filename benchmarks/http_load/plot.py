"""The plot: throughput at saturation, and latency by budget at nine tenths of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.http_load.contenders import BATCHING, FEWER_STEPS, LOCK, OURS, UNGROUPED
from benchmarks.http_load.measurement import MIX, POISSON

_LEVEL = 0.9
_COLOURS: Mapping[str, str] = {
    LOCK: "#aaaaaa",
    BATCHING: "#777777",
    FEWER_STEPS: "#1f77b4",
    UNGROUPED: "#ff9896",
    OURS: "#d62728",
}
_BUDGETS = ("exact", "high", "default", "fast", "draft")


def draw(path: Path, result: Mapping[str, Any]) -> None:
    """Write the plot of a result. The background is white, for pages of any colour."""
    figure = Figure(figsize=(10, 4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    _draw_throughput(left, result)
    _draw_latency(right, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_throughput(panel: Axes, result: Mapping[str, Any]) -> None:
    rows = [row for row in result["saturation"] if row["load"] == MIX]
    qualities = {row["contender"]: row["quality"] for row in result["quality"]}
    names = [row["contender"] for row in rows]
    bars = panel.bar(names, [row["per_s"] for row in rows], color=[_COLOURS[name] for name in names])
    panel.bar_label(
        bars, [f"{row['per_s']:.2f}\n(quality {qualities[row['contender']]:.3f})" for row in rows], fontsize=8
    )
    panel.set_title("mixed budgets, at saturation")
    panel.set_ylabel("requests a second")
    panel.margins(y=0.15)
    panel.tick_params(axis="x", labelsize=8)


def _draw_latency(panel: Axes, result: Mapping[str, Any]) -> None:
    """A bar for the median of each budget, and a line from it to the 95th percentile."""
    rows = [row for row in result["latencies"] if row["level"] == _LEVEL and row["pattern"] == POISSON]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        of_budget = {row["budget"]: row for row in rows if row["contender"] == name and row["p50_s"] is not None}
        known = [(index, of_budget[budget]) for index, budget in enumerate(_BUDGETS) if budget in of_budget]
        at = [index + (place - (len(names) - 1) / 2) * width for index, _ in known]
        panel.bar(at, [row["p50_s"] for _, row in known], width, color=_COLOURS[name], label=name)
        panel.vlines(at, [row["p50_s"] for _, row in known], [row["p95_s"] for _, row in known], color=_COLOURS[name])
    panel.set_xticks(range(len(_BUDGETS)), _BUDGETS)
    panel.set_title("latency at 0.9 of the own throughput: median, and line to p95")
    panel.set_ylabel("seconds")
    panel.legend(frameon=False, fontsize=8)
