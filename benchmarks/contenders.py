"""The contenders of a whole-model benchmark: the stock model, and the elastic model at each budget, timed in turn."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tqdm import tqdm

from benchmarks.table import TableRow
from models.engine import Engine
from models.report import GenerationSummary
from models.request import Budget, ComputeBudget, GenerationRequest, PresetBudget


@dataclass(frozen=True, slots=True)
class Contender:
    """A name and a budget; a budget of None means the stock model. `is_compiled` says whether its blocks are."""

    name: str
    budget: Budget | None
    is_compiled: bool = False


class Denoising(NamedTuple):
    """One run of a denoise loop: seconds, compute ratio, and the seconds spent in routers."""

    seconds: float
    compute_ratio: float = 1.0
    router_seconds: float = 0.0


def contenders(engine: Engine, model: str, caps: Sequence[float]) -> list[Contender]:
    presets = [point.preset for point in engine.cards[model].curve if point.preset]
    return [
        Contender("stock", None),
        *(Contender(str(preset), PresetBudget(preset)) for preset in presets),
        *(Contender(f"compute {cap:g}", ComputeBudget(cap)) for cap in caps),
    ]


def elastic_denoise(engine: Engine, requests: Sequence[GenerationRequest]) -> Denoising:
    """Our denoise loop, with all requests in one batch."""
    states = [engine.start(request) for request in requests]
    router_seconds = 0.0
    started = time.perf_counter()
    while not states[0].is_done:
        router_seconds += engine.step(states).router_seconds
    seconds = time.perf_counter() - started
    return Denoising(seconds, statistics.mean(state.summary().compute_ratio for state in states), router_seconds)


def time_in_turn(
    names: Sequence[Contender],
    num_rounds: int,
    title: str,
    denoise: Callable[[Contender, int], Denoising],
    has_time: Callable[[], bool] = lambda: True,
) -> list[TableRow]:
    """One row per contender: name, compute ratio, seconds, and time over stock (median, and the middle four fifths).

    `denoise` takes a contender and the number of a round, and runs the contender on that round's inputs. One extra
    round warms up. After the first two, no round begins without time.
    """
    runs: dict[str, list[Denoising]] = {contender.name: [] for contender in names}
    for number in tqdm(range(num_rounds + 1), desc=title):
        if number > 1 and not has_time():
            break
        first = number % len(names)  # so that no contender always follows the same one
        for contender in (*names[first:], *names[:first]):
            run = denoise(contender, number)
            if number:
                runs[contender.name].append(run)
    stock_times = [run.seconds for run in runs["stock"]]
    rows: list[TableRow] = []
    for name, own in runs.items():
        ratios = sorted(run.seconds / stock for run, stock in zip(own, stock_times, strict=True))
        rows.append(
            {
                "name": name,
                "compute_ratio": statistics.mean(run.compute_ratio for run in own),
                "seconds": statistics.median(run.seconds for run in own),
                "time_ratio": statistics.median(ratios),
                "time_ratio_low": ratios[len(ratios) // 10],
                "time_ratio_high": ratios[-1 - len(ratios) // 10],
                "router_share": statistics.median(run.router_seconds for run in own) / statistics.median(stock_times),
            }
        )
    return rows


def decisions(summaries: Sequence[GenerationSummary]) -> dict[str, float]:
    """Mean compute and MLP width of the requests, and the shares of forecasts, skips and re-uses in all decisions."""
    total = sum(s.num_run + s.num_skipped + s.num_reused + s.num_forecast for s in summaries)
    return {
        "compute_ratio": statistics.mean(s.compute_ratio for s in summaries),
        "forecast_rate": sum(s.num_forecast for s in summaries) / total,
        "skip_rate": sum(s.num_skipped for s in summaries) / total,
        "reuse_rate": sum(s.num_reused for s in summaries) / total,
        "mean_mlp_width": statistics.mean(s.mean_mlp_width for s in summaries),
    }
