"""Which way to buy speed costs least quality?

`python -m benchmarks.frontier` compares, on each small model, fewer denoise steps, second-order solvers, the caches of
diffusers and of cache-dit, our rules, and the points that presets use, each over its range of settings.

quality  the mean over held-out prompts of the similarity to the dense result of the same seed at full steps:
         `Engine.similarity`, which is SSIM for images and volume IoU for meshes. p10 is the tenth percentile
time     denoise time over that of the unmodified pipeline. In a process that runs alone, the unmodified pipeline and
         all settings of a contender take turns; a ratio compares within a round, and its median is reported
compute  floating-point operations of the denoise loop over those of the unmodified pipeline, counted on four prompts

Intervals are bootstrap intervals of 95 % over prompts and rounds. The headline table has the time that each contender
needs for a quality, by straight lines between its best settings, and this time over that of our presets.

Each contender runs in a process of its own, with one thread: importing cache-dit changes diffusers' caches. Caches that
decide for a whole batch make the results for the quality one at a time; the others make eight, which gives the same.
Figures are kept in records.jsonl in the folder `--out`, so an interrupted run goes on where it stopped; those of other
weights are measured again.

A solver of second order approaches the exact solution of the model's equation, not the dense result, which is Euler's
at full steps. So its similarity to the dense result has a limit below 1.

Hunyuan3D is no model of diffusers. Fewer steps, diffusers' solvers and our rules are attached to it. The caches of
diffusers and of cache-dit hook into diffusers' transformers and are left out there.
"""

import argparse
import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.frontier.comparison import Comparison, Options
from benchmarks.table import TableRow, finish, show

_MODELS = ("tiny-flux", "tiny-qwen-image", "tiny-hunyuan3d")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, nargs="+", default=[Path("checkpoints") / name for name in _MODELS], metavar="DIRECTORY"
    )
    parser.add_argument("--router-weights", type=Path, default=Path("router_weights"))
    parser.add_argument("--contenders", nargs="+", default=[], metavar="NAME", help="all if not given")
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts or, for meshes, half as many solids")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1], help="batch sizes of times; the first is plotted"
    )
    parser.add_argument("--sides", type=int, nargs="+", default=[], help="measure times of images at these sides, too")
    parser.add_argument("--processes", type=int, default=2, help="for quality; times are measured by one")
    parser.add_argument("--out", type=Path, default=Path("runs/frontier"), help="folder of the figures")
    parser.add_argument("--plot", type=Path, help="draw quality against time into this file")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def compact(row: TableRow) -> TableRow:
    """The row with intervals in brackets behind their figures."""
    short = {key: value for key, value in row.items() if not key.endswith(("_low", "_high"))}
    intervals = {key: f"({row[f'{key}_low']:.4f}-{row[f'{key}_high']:.4f})" for key in ("time", "quality", "p10")}
    return short | {key: f"{row[key]:.4f} {interval}" for key, interval in intervals.items()}


def headline_table(rows: list[TableRow]) -> list[TableRow]:
    """One row per contender: its time at each quality and, in brackets, this time over that of the presets."""
    table: dict[str, TableRow] = {}
    for row in rows:
        name = str(row["contender"])
        bound = "<" if row["is_upper_bound"] else ""
        ratio = f" ({row['over_ours']:.2f})" if row["over_ours"] is not None else ""
        table.setdefault(name, {"contender": name})[f"time at {row['quality']}"] = f"{bound}{row['time']:.3f}{ratio}"
    return [*table.values()]


def main() -> None:
    arguments = parse_arguments()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # each process would warn, between the lines of the bar
    has_cache_dit = importlib.util.find_spec("cache_dit") is not None
    versions = {"cache-dit": importlib.metadata.version("cache-dit")} if has_cache_dit else {}
    models: dict[str, dict[str, Any]] = {}
    for directory in arguments.model:
        comparison = Comparison(directory, options_of(arguments))
        comparison.measure()
        settings, headline = comparison.settings(), comparison.headline()
        show(f"{directory.name}: settings", [compact(row) for row in settings])
        show(f"{directory.name}: time over the stock pipeline's for a quality (over ours)", headline_table(headline))
        for name, reason in comparison.left_out.items():
            print(f"left out: {name}: {reason}")
        models[directory.name] = {
            "prompts": comparison.num_prompts,
            "settings": settings,
            "headline": headline,
            "left_out": comparison.left_out,
        }
    if arguments.plot:
        from benchmarks.frontier.plot import draw  # matplotlib is in the extra 'peers'

        draw(arguments.plot, {name: model["settings"] for name, model in models.items()})
    result = {
        "benchmark": "frontier",
        "environment": environment() | versions | {"threads": "1"},
        "rounds": arguments.rounds,
        "batch_sizes": arguments.batches,
        "models": models,
    }
    finish(result, arguments.json)


def options_of(arguments: argparse.Namespace) -> Options:
    return Options(
        out=arguments.out,
        router_weights=arguments.router_weights,
        contenders=arguments.contenders,
        num_prompts=arguments.prompts,
        num_rounds=arguments.rounds,
        sides=arguments.sides,
        batch_sizes=arguments.batches,
        num_processes=arguments.processes,
    )


if __name__ == "__main__":
    main()
