"""The plot of quality against time, one panel per model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.frontier.bootstrap import frontier
from benchmarks.frontier.contenders import PRESETS

_WORST = 0.9
"""Lowest quality drawn."""

_STYLES: Mapping[str, tuple[str, str, str]] = {
    # Colour, marker and line. Ours are warm colours; of a kind of peers, one colour.
    PRESETS: ("#d62728", "o", "-"),
    "router": ("#bcbd22", "^", "-"),
    "fewer steps": ("#222222", "o", "-"),
    "DPM-Solver++ 2M": ("#777777", "s", "-"),
    "UniPC": ("#aaaaaa", "^", "-"),
    "FirstBlockCache": ("#1f77b4", "o", "--"),
    "SeaCache": ("#17becf", "s", "--"),
    "MagCache": ("#8c564b", "^", "--"),
    "TaylorSeer": ("#9467bd", "o", ":"),
    "TaylorSeer lite": ("#9467bd", "s", "--"),
    "DBCache": ("#2ca02c", "o", "--"),
    "DBCache + TaylorSeer": ("#2ca02c", "s", ":"),
}


def draw(path: Path, settings_of_models: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write the plot; each row of settings has contender, time and quality.

    Lines join the settings that no other of the contender beats in both; the others are faint. The background is white,
    for pages of any colour.
    """
    figure = Figure(figsize=(4.4 * len(settings_of_models), 5.4), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(settings_of_models), sharey=True, squeeze=False)[0]
    for panel, (model, rows) in zip(panels, settings_of_models.items(), strict=True):
        _draw_panel(panel, model, rows)
    panels[0].set_ylabel("quality: similarity to the dense result (mean)")
    labelled = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    known = [name for name in _STYLES if name in labelled]
    columns = max(2, 5 * len(panels) // 3)
    figure.legend([labelled[name] for name in known], known, loc="outside lower center", ncols=columns, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_panel(panel: Axes, model: str, rows: Sequence[Mapping[str, Any]]) -> None:
    for name, (colour, marker, line) in _STYLES.items():
        own = [row for row in rows if row["contender"] == name]
        if not own:
            continue
        times, losses = np.array([row["time"] for row in own]), np.array([1 - row["quality"] for row in own])
        is_ours = name == PRESETS
        panel.plot(times, losses, marker, color=colour, alpha=0.35, markersize=4, linestyle="none")
        kept_times, kept_qualities = frontier(times, 1 - losses)
        panel.plot(
            kept_times[:-1],  # without the stock loop, whose loss of 0 has no place on the axis
            1 - kept_qualities[:-1],
            marker=marker,
            linestyle=line,
            color=colour,
            label=name,
            linewidth=3 if is_ours else 1.4,
            markersize=7 if is_ours else 4,
            zorder=3 if is_ours else 2,
        )
    panel.set_title(model)
    panel.set_xlabel("denoise time / stock pipeline's")
    panel.set_xlim(0, 1)
    panel.set_yscale("log")
    panel.set_ylim(1 - _WORST, 0.001)
    ticks = [0.1, 0.06, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001]
    panel.yaxis.set_major_locator(FixedLocator(ticks))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{1 - loss:.3f}".rstrip("0")))
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
