"""Ways to denoise at published size, timed in turn: the stock pipeline, and our engine at forced shares of compute."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.contenders import Contender, Denoising, time_in_turn
from benchmarks.real_size.subjects import Subject, requests, stock_latents, stock_pipeline
from benchmarks.table import TableRow
from models.curve import EXACT, CurvePoint
from models.elastic.compute import BlockCost
from models.elastic.plan import MLP_WIDTHS, REUSE, RUN_IN_FULL, SKIP, Policy, RowPlan, RowView
from models.engine import Engine
from models.report import Decision
from models.state import DenoiseState

SHARES = (0.75, 0.5, 0.35)
_RUN_AND_KEEP = RowPlan(Decision.RUN, keeps_residual=True)


class ForcedRule:
    """Follows a list with one plan per block and ignores the routers' scores, which are computed and read."""

    needs_scores = True

    def __init__(self, plans: Sequence[RowPlan]) -> None:
        self._plans = plans

    def plan(self, row: RowView, policy: Policy) -> RowPlan:
        plan = self._plans[row.block_index]
        return _RUN_AND_KEEP if plan == REUSE and row.num_reuses is None else plan


def forced_plans(costs: Sequence[BlockCost], share: float) -> list[RowPlan]:
    """Plans for blocks of these costs that leave about `share` of the compute.

    Two fifths are saved by skips, two by re-use and one by narrower MLPs, evenly over the depth. Blocks that run keep
    their residuals, as under the router rule when it may re-use.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way to denoise.

    By the stock pipeline in `stock_steps` steps, or by our engine at a `point`. There, blocks may be forced to a
    `share` of their compute by plans, the same in every row or, if `is_mixed`, shifted in depth from row to row, so
    that rows must be gathered in most blocks. Results are exact unless calls are shared.
    """

    stock_steps: int = 0
    point: CurvePoint = EXACT
    share: float | None = None
    is_mixed: bool = False
    shares_calls: bool = False
    is_compiled: bool = False


def begin(family: Subject, way: Way, side: int, batch_size: int, num_steps: int) -> list[DenoiseState]:
    """The states of a batch before their first step."""
    each = requests(family, side, batch_size, num_steps)
    states = [family.start(request, (EXACT,), way.point) for request in each]
    rows = [row for state in states for row in state.rows]
    if way.share is not None:
        costs = list(rows[0].costs.values())
        plans = [RUN_IN_FULL] * len(costs) if way.share == 1 else forced_plans(costs, way.share)
        for number, row in enumerate(rows):
            shift = number * len(plans) // len(rows) if way.is_mixed else 0
            row.rule = ForcedRule(plans[shift:] + plans[:shift])
    if way.shares_calls or way.share is not None:
        for state in states:
            state.exact_tolerance = None
    return states


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Runner:
    """Denoises one model in several ways. `compiled` is the same with compiled blocks, if that is asked for."""

    def __init__(self, family: Subject, compiled: Subject | None = None) -> None:
        self.family = family
        self._families = {False: family, True: compiled or family}
        self._pipelines: dict[bool, Any] = {False: stock_pipeline(family)}
        if compiled:
            self._pipelines[True] = stock_pipeline(family, is_compiled=True)

    def denoise(self, way: Way, side: int, batch_size: int, num_steps: int) -> tuple[torch.Tensor, Denoising]:
        """The latents `(batch, tokens, channels)`, and what they cost."""
        family = self._families[way.is_compiled]
        synchronize(family.device)
        started = time.perf_counter()
        if way.stock_steps:
            pipeline, each = self._pipelines[way.is_compiled], requests(family, side, batch_size, way.stock_steps)
            latents = stock_latents(pipeline, family, each)
            ratio = way.stock_steps / num_steps
        else:
            states = begin(family, way, side, batch_size, num_steps)
            engine = Engine({family.model_id: family}, {})
            while not states[0].is_done:
                engine.step(states)
            latents = torch.cat([state.latents for state in states])
            ratio = statistics.mean(state.compute_ratio for state in states)
        synchronize(family.device)
        return latents, Denoising(time.perf_counter() - started, ratio)

    def time(
        self,
        ways: Mapping[str, Way],
        side: int,
        batch_size: int,
        num_steps: int,
        num_rounds: int,
        has_time: Callable[[], bool],
    ) -> list[TableRow]:
        """One row for each way, as `time_in_turn` makes them, with the time over the compute. One must be `stock`."""

        def denoise(contender: Contender, _: int) -> Denoising:
            return self.denoise(ways[contender.name], side, batch_size, num_steps)[1]

        names = [Contender(name, None) for name in ways]
        title = f"{self.family.model_id} at {side}x{side}, batch {batch_size}"
        rows = time_in_turn(names, num_rounds, title, denoise, has_time)
        for row in rows:
            del row["router_share"]
            row["per_compute"] = float(row["time_ratio"] or 0) / float(row["compute_ratio"] or 1)
        return rows
