"""How much time does it save to group requests by predicted sparsity?

`python -m benchmarks.batching` sends dense requests, which compute every step, and light ones (`draft`) of one size at
once. Dense ones share steps here, as those with a deadline do; exact ones would not. Two batchers serve them in turn,
round by round: the service's, and one in which all requests share every step. `dense_ratio` and
`light_ratio` compare the mean time from arrival to last step under the service's batcher with that under the other
one; `all_ratio` compares the time until all have ended. `dense_of_share` and `light_of_share` compare the mean time
with that on a device of its own for each request, as fast as its share of this one: the time alone, times the number
of requests. Medians over rounds are reported. Loads of one kind alone are measured too; these should lose nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.engine import requests_for
from benchmarks.environment import environment
from benchmarks.table import TableRow, finish, show
from models.curve import Preset
from models.engine import Engine
from models.request import GenerationRequest, PresetBudget
from models.zoo import load_engine
from service.scheduling.batching import Candidate, FairShare, form_groups
from service.scheduling.cost import block_seconds
from training.scenes.prompts import complex_scenes

Group = Callable[[Sequence[Candidate]], list[list[int]]]


@dataclass(frozen=True, slots=True)
class Load:
    """The numbers of dense and of `draft` requests that arrive together."""

    num_dense: int
    num_light: int


def one_group(candidates: Sequence[Candidate]) -> list[list[int]]:
    """The other batcher: all requests in one group, whatever their sparsity."""
    return [list(range(len(candidates)))]


def serve(engine: Engine, requests: Sequence[GenerationRequest], group: Group) -> list[float]:
    """Seconds until each request has taken its last step, in the service's loop with the batcher `group`."""
    card = engine.cards[requests[0].model]
    states, fair_share = [engine.start(request) for request in requests], FairShare()
    for state in states:
        state.exact_tolerance = None  # so that dense ones share steps
    costs = [block_seconds(request, card) for request in requests]
    alone = [
        Candidate(state.batch_key, 0.0, state.expected_runs, cost).step_seconds
        for state, cost in zip(states, costs, strict=True)
    ]
    turns = [
        fair_share.join(state.num_computed_steps * seconds, 1.0) for state, seconds in zip(states, alone, strict=True)
    ]
    ends = [0.0] * len(states)
    running = list(range(len(states)))
    started = time.perf_counter()
    while running:
        candidates = [Candidate(states[i].batch_key, turns[i], states[i].expected_runs, costs[i]) for i in running]
        chosen = group(candidates)[0]
        engine.step([states[running[place]] for place in chosen])
        for place in chosen:
            fair_share.spend(alone[running[place]])
            if states[running[place]].is_done:
                ends[running[place]] = time.perf_counter() - started
        running = [i for i in running if not states[i].is_done]
    return ends


def measure(engine: Engine, model: str, side: int, load: Load, num_rounds: int) -> TableRow:
    scenes = complex_scenes(load.num_dense + load.num_light)
    budgets = [Preset.EXACT] * load.num_dense + [Preset.DRAFT] * load.num_light
    requests = [
        requests_for(engine, model, [scene], PresetBudget(preset), side)[0]
        for scene, preset in zip(scenes, budgets, strict=True)
    ]
    runs: dict[str, list[list[float]]] = {"ours": [], "one group": []}
    alone: list[list[float]] = []
    for number in tqdm(range(num_rounds + 1), desc=f"{load.num_dense} + {load.num_light} at {side}"):
        pair: list[tuple[str, Group]] = [("ours", form_groups), ("one group", one_group)]
        for name, group in pair if number % 2 else pair[::-1]:
            ends = serve(engine, requests, group)
            if number:  # the first round warms up
                runs[name].append(ends)
        if number:
            of_kind = {request.budget: serve(engine, [request], form_groups)[0] for request in requests[::-1]}
            alone.append([of_kind[request.budget] for request in requests])

    def ratio(of: Callable[[Sequence[float]], float]) -> float:
        return statistics.median(of(a) / of(b) for a, b in zip(runs["ours"], runs["one group"], strict=True))

    row: TableRow = {"side": side, "dense": load.num_dense, "light": load.num_light}
    of_dense = ratio(lambda ends: statistics.mean(ends[: load.num_dense])) if load.num_dense else None
    of_light = ratio(lambda ends: statistics.mean(ends[load.num_dense :])) if load.num_light else None
    row |= {"dense_ratio": of_dense, "light_ratio": of_light}
    of_share = [
        [end / (time * len(requests)) for end, time in zip(*pair, strict=True)]
        for pair in zip(runs["ours"], alone, strict=True)
    ]
    kinds = {"dense_of_share": slice(load.num_dense), "light_of_share": slice(load.num_dense, None)}
    for name, part in kinds.items():
        row[name] = statistics.median(statistics.mean(ends[part]) for ends in of_share) if of_share[0][part] else None
    return row | {"all_ratio": ratio(max), "all_seconds": statistics.median(map(max, runs["ours"]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/tiny-flux"))
    parser.add_argument("--router-weights", type=Path, default=Path("router_weights"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    engine = load_engine([arguments.model], device="cpu", router_weights=arguments.router_weights)
    model = arguments.model.name
    loads = [Load(4, 4), Load(1, 7), Load(7, 1), Load(8, 0), Load(0, 8)]
    rows = [
        measure(engine, model, side, load, arguments.rounds)
        for side in arguments.sides
        for load in tqdm(loads, desc="loads")
    ]
    show(f"Seconds under the service's batcher, and ratios to all requests sharing every step; {model}", rows)
    result = {
        "benchmark": "batching",
        "model": model,
        "fixed_share": engine.cards[model].fixed_share,
        "environment": environment(),
        "rows": rows,
    }
    finish(result, arguments.json)


if __name__ == "__main__":
    main()
