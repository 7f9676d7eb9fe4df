"""Does skipped work take no time, at the sizes that people run?

`python -m benchmarks.real_size` builds the transformers of FLUX.1-dev and Qwen-Image at their published sizes, with
random weights, on the device. It times single denoise steps; in each round every contender takes one step in turn:

stock            the unmodified transformer, called as its pipeline does; with guidance, one call per branch
stock, one call  like stock, but all branches in one call, with shorter prompts padded and masked (Qwen-Image)
exact            our engine, with every block running, and the calls of `stock` for each request by itself
routers          our engine with every block running, but routers score every block and their scores are read: the
                 price of deciding
0.75 equal       our engine under a forced plan that leaves about 0.75 of the compute, the same plan in every row
0.75 mixed       the same plan shifted in depth from row to row, so that rows must be gathered in most blocks

A forced plan saves about two fifths by skips, two fifths by re-use and one fifth by narrower MLPs, evenly over the
depth. Routers run and are waited for as in serving, but their scores are ignored, since random routers decide nothing
sensible. Random weights say nothing about quality and do not change times. Prompts are random embeddings of realistic
length.

time_ratio    a round's seconds over stock's in that round: median, and the middle four fifths
per_compute   time_ratio / compute_ratio: 1 if time follows compute
router_share  seconds of `routers` over those of `exact`, as a share of the contender's own
gather_cost   per_compute of `mixed` over that of `equal`, less 1: copies, and smaller batches
waits         how often per step the host waited for the device: on CUDA by `torch.cuda.set_sync_debug_mode`, else
              calls of Tensor.tolist and Tensor.item, which compiled code also makes by itself
peak_gib      the most device memory in use, weights included (CUDA); bank_gib is the part of stored residuals
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.real_size_models import MODELS, StockStep, Subject
from benchmarks.table import TableRow, finish, show
from models.card import Guidance
from models.curve import EXACT, Preset
from models.elastic.compute import BlockCost
from models.elastic.plan import MLP_WIDTHS, REUSE, RUN_IN_FULL, SKIP, Policy, RowPlan, RowView, Rule
from models.engine import Engine
from models.report import Decision
from models.request import ImageRequest, PresetBudget
from models.rules.dense import DenseRule
from models.state import DenoiseState

SHARES = (0.75, 0.5, 0.35)
_RUN_AND_KEEP = RowPlan(Decision.RUN, keeps_residual=True)


class ForcedRule:
    """Follows a list with one plan per block and ignores the routers' scores."""

    needs_scores = True

    def __init__(self, plans: Sequence[RowPlan]) -> None:
        self._plans = plans

    def plan(self, row: RowView, policy: Policy) -> RowPlan:
        plan = self._plans[row.block_index]
        return _RUN_AND_KEEP if plan == REUSE and row.num_reuses is None else plan


def forced_plans(costs: Sequence[BlockCost], share: float) -> list[RowPlan]:
    """Plans for blocks of these costs that leave about `share` of the compute.

    Blocks that run keep their residuals, as under the router rule when it may re-use.
    """
    to_save = (1 - share) * sum(cost.dense for cost in costs)
    left_out: list[RowPlan] = []
    chosen: list[RowPlan | None] = []
    debt = 0.0
    for cost in costs:
        debt += 0.8 * (1 - share) * cost.dense
        leaves_out = debt > cost.dense / 2
        if leaves_out:
            debt -= cost.dense
            to_save -= cost.dense
            left_out.append(REUSE if len(left_out) % 2 else SKIP)
        chosen.append(left_out[-1] if leaves_out else None)
    mean_width = 1 - to_save / sum(cost.mlp for cost, plan in zip(costs, chosen, strict=True) if plan is None)
    plans, error = [], 0.0
    for plan in chosen:
        if plan is None:
            width = min(MLP_WIDTHS, key=lambda w: abs(w - mean_width - error))
            error += mean_width - width
            plan = RowPlan(Decision.RUN, width, keeps_residual=True)
        plans.append(plan)
    return plans


@dataclass(frozen=True, slots=True)
class Contender:
    """Takes the step: the stock transformer by `stock_step`, or our engine with one rule per row."""

    name: str
    rules: Sequence[Rule[Any]]
    stock_step: StockStep | None = None


def contenders(subject: Subject, costs: Sequence[BlockCost], num_rows: int) -> list[Contender]:
    stock = [Contender(name, [DenseRule()] * num_rows, step) for name, step in subject.stock_steps.items()]
    everything = ForcedRule([RUN_IN_FULL] * len(costs))
    forced = []
    for share in SHARES:
        plans = forced_plans(costs, share)
        shifts = [row * len(plans) // num_rows for row in range(num_rows)]
        forced.append(Contender(f"{share} equal", [ForcedRule(plans)] * num_rows))
        if num_rows > 1:
            forced.append(Contender(f"{share} mixed", [ForcedRule(plans[n:] + plans[:n]) for n in shifts]))
    exact = Contender("exact", [DenseRule()] * num_rows)
    return [*stock, exact, Contender("routers", [everything] * num_rows), *forced]


def start(subject: Subject, side: int, batch_size: int) -> list[DenoiseState]:
    requests = [
        ImageRequest(
            model=subject.family.model_id,
            prompt="",
            height=side,
            width=side,
            num_inference_steps=8,
            guidance_scale=4.0,
            seed=seed,
            budget=PresetBudget(Preset.EXACT),
            point=EXACT,
            is_guided=subject.family.guidance is Guidance.TRUE,
        )
        for seed in range(batch_size)
    ]
    return [subject.family.start(request, (EXACT,), EXACT) for request in requests]


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[str]]:
    """Collect one entry each time the host waits for the device."""
    waits: list[str] = []
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits += [text for warning in caught if "synchroniz" in (text := str(warning.message))]
        return

    def counting(name: str, read: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
        def counted(tensor: Tensor) -> object:
            waits.append(name)
            return read(tensor)

        return counted

    with (
        patch.object(Tensor, "tolist", counting("tolist", Tensor.tolist)),
        patch.object(Tensor, "item", counting("item", Tensor.item)),
    ):
        yield waits


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    subject: Subject, side: int, batch_size: int, num_rounds: int, tick: Callable[[], object] = lambda: None
) -> list[TableRow]:
    """One row per contender, with the columns above. The first round warms up, and counts waits and memory."""
    device: torch.device = subject.family.transformer.device
    engine = Engine({subject.family.model_id: subject.family}, {})
    states = start(subject, side, batch_size)
    rows = [row for state in states for row in state.rows]
    entrants = contenders(subject, list(rows[0].costs.values()), len(rows))
    seconds: dict[str, list[float]] = {contender.name: [] for contender in entrants}
    observed: dict[str, TableRow] = {}
    for number in range(num_rounds + 1):
        first = number % len(entrants)  # so that no contender always follows the same one
        for contender in (*entrants[first:], *entrants[:first]):
            states = start(subject, side, batch_size)
            for row, rule in zip([row for state in states for row in state.rows], contender.rules, strict=True):
                row.rule = rule
            if contender.name != "exact":  # the others share their calls
                for state in states:
                    state.exact_tolerance = None
            step = contender.stock_step or engine.step
            step(states)  # fills the residual banks
            if number:
                synchronize(device)
                started = time.perf_counter()
                step(states)
                synchronize(device)
                seconds[contender.name].append(time.perf_counter() - started)
            else:
                observed[contender.name] = observe(step, states, device, is_stock=contender.stock_step is not None)
            tick()
    return [summary(contender.name, seconds, observed) for contender in entrants]


def observe(
    step: Callable[[Sequence[DenoiseState]], object],
    states: Sequence[DenoiseState],
    device: torch.device,
    *,
    is_stock: bool,
) -> TableRow:
    """The columns of a step that are counted, not timed."""
    spent = sum(state.spent_flops for state in states)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with counted_waits(device) as waits:
        step(states)
    residuals = [r for state in states for row in state.rows for r in row.residuals.values()]
    bank = sum(r.hidden_states.nbytes + r.encoder_hidden_states.nbytes for r in residuals)
    flops = sum(state.spent_flops for state in states) - spent
    return {
        "compute_ratio": 1.0 if is_stock else flops / sum(state.dense_flops for state in states),
        "waits": len(waits),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "bank_gib": bank / 2**30,
    }


def summary(name: str, seconds: Mapping[str, Sequence[float]], observed: Mapping[str, TableRow]) -> TableRow:
    compute = {key: float(row["compute_ratio"] or 0) for key, row in observed.items()}
    typical = {key: statistics.median(times) for key, times in seconds.items()}
    ratios = sorted(t / stock for t, stock in zip(seconds[name], seconds["stock"], strict=True))
    per_compute = {key: typical[key] / typical["stock"] / compute[key] for key in compute}
    needs_routers = name == "routers" or name.endswith(("equal", "mixed"))
    gather_cost = per_compute[name] / per_compute[name.replace("mixed", "equal")] - 1 if "mixed" in name else None
    return {
        "name": name,
        "compute_ratio": compute[name],
        "seconds": typical[name],
        "time_ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 10],
        "high": ratios[-1 - len(ratios) // 10],
        "per_compute": statistics.median(ratios) / compute[name],
        "router_share": (typical["routers"] - typical["exact"]) / typical[name] if needs_routers else None,
        "gather_cost": gather_cost,
        **{key: observed[name][key] for key in ("waits", "peak_gib", "bank_gib")},
    }


def compile_blocks(subject: Subject) -> None:
    """Compile every block at every width. Blocks of a kind share graphs, and one graph serves all batches above 1."""
    torch._dynamo.config.recompile_limit = 64  # kinds, widths, sides, and batches of one or more
    for block in subject.family.blocks:
        for variant in block.variants.values():
            variant.compile(dynamic=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--reduced", action="store_true", help="small transformers, for a CPU; about a minute")
    parser.add_argument("--only", choices=MODELS)
    parser.add_argument("--sides", type=int, nargs="+", metavar="PIXELS")
    parser.add_argument("--batches", type=int, nargs="+", metavar="SIZE")
    parser.add_argument("--rounds", type=int, help="timed rounds; 7, or 3 with --reduced")
    parser.add_argument(
        "--compile", action="store_true", help="compile the blocks, also those of the stock transformer"
    )
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def measure_model(name: str, arguments: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[TableRow]:
    """The rows of all sizes and batches of one model. Its weights are freed afterwards."""
    model = MODELS[name]
    scale = model.reduced if arguments.reduced else model.full
    subject = model.build(scale, device, dtype)
    if arguments.compile:
        compile_blocks(subject)
    results: list[TableRow] = []
    for side in arguments.sides or scale.sides:
        for batch_size in arguments.batches or scale.batch_sizes:
            title = f"{name} at {side}x{side}, batch {batch_size}"
            with tqdm(desc=title, unit="step", leave=False) as bar:
                rows = measure(
                    subject, side, batch_size, arguments.rounds or (3 if arguments.reduced else 7), bar.update
                )
            show(title, rows)
            results += [{"model": name, "side": side, "batch_size": batch_size, **row} for row in rows]
    return results


def main() -> None:
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    results: list[TableRow] = []
    for name in [arguments.only] if arguments.only else MODELS:
        results += measure_model(name, arguments, device, dtype)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    finish(
        {
            "benchmark": "real_size",
            "environment": environment(),
            "run_on": f"{device} in {dtype}",
            "reduced": arguments.reduced,
            "compiled": arguments.compile,
            "steps": results,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
