"""Do light requests feel light while exact ones run beside them?

`python -m benchmarks.scheduling` keeps a worker busy in this process, without HTTP. Clients ask for images of mixed
budgets, each for its next one as soon as it has the last. Two schedulers serve the same load, round by round: the
service's, and first-come turn-taking. There jobs are claimed in the order of their arrival, the request that has waited
longest for a step leads the next one, and all that can share its step do. `ratio` compares the mean time from arrival
to result of one budget under the service's scheduler with that under turn-taking, and `throughput_ratio` the images a
second. `queue` is the part of the time before the start. Seconds are those of the processor, as on a machine with one
core and nothing else to do: the worker always has work, so others that use the machine do not count.
"""

import argparse
import asyncio
import random
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm import tqdm

from benchmarks.engine import requests_for
from benchmarks.environment import environment
from benchmarks.table import TableRow, finish, show
from models.card import ModelCard
from models.curve import Preset
from models.engine import Engine
from models.request import ImageRequest, PresetBudget
from models.zoo import load_engine
from service.app import build_dispatcher
from service.jobs.job import Job, Priority, Receipt
from service.jobs.store import ended
from service.order import Output
from service.running.dispatcher import Dispatcher
from service.running.held import Running
from service.running.worker import Worker
from service.scheduling.cost import order_seconds
from service.scheduling.queueing import due_at
from service.settings import Settings
from training.scenes.prompts import complex_scenes

Receipts = Mapping[Preset, Sequence[Receipt]]
_PARTS = ("queue", "total")


_FAR = 1e6
"""Above all turns that the service's scheduler gives."""


class TurnTakingWorker(Worker):
    """Those that waited longest for a step go first, with all that can share it."""

    def _next_batch(self, engine: Engine) -> Sequence[Running]:
        ready = self._ready()
        for running in ready:
            if running.turn < _FAR:  # it has just come
                running.turn = time.monotonic() + _FAR
        ready.sort(key=lambda running: running.turn)
        batch = [running for running in ready if running.state.batch_key == ready[0].state.batch_key]
        batch = list(self._room.cut(batch, self._running))
        for running in batch:
            running.turn = time.monotonic() + _FAR
        return batch


def job_of(request: ImageRequest, card: ModelCard, now: float) -> Job:
    seconds = order_seconds([request], card)
    return Job(
        id=uuid.uuid4().hex,
        model=request.model,
        requests=(request,),
        output=Output(),
        priority=Priority.NORMAL,
        quality_requested=None,
        predicted_seconds=seconds,
        request_id="benchmark",
        created_at=now,
        due_at=due_at(now, seconds),
        memory=card.memory_of(request),
    )


async def load(dispatcher: Dispatcher, requests: Sequence[ImageRequest], num_clients: int, seconds: float) -> Receipts:
    """Receipts of the jobs that ended within `seconds`."""
    store, receipts = dispatcher.store, defaultdict(list)
    ends = time.process_time() + seconds

    async def client(number: int) -> None:
        draw = random.Random(number)  # so each scheduler gets the same orders of a client
        while time.process_time() < ends:
            request = draw.choice(requests)
            job = job_of(request, dispatcher.cards[request.model], store.clock())
            await store.add(job)
            snapshot = await ended(store, job.id)
            if time.process_time() < ends:
                assert isinstance(request.budget, PresetBudget)
                receipts[request.budget.preset].append(snapshot.state.receipts[0])

    async with dispatcher.running():
        await asyncio.gather(*map(client, range(num_clients)))
    return receipts


def serve(
    engine: Engine, requests: Sequence[ImageRequest], num_clients: int, seconds: float, *, turns: bool
) -> Receipts:
    async def run() -> Receipts:
        dispatcher = build_dispatcher(Settings(), lambda: engine, clock=time.process_time)
        await asyncio.to_thread(dispatcher.worker.start)
        return await load(dispatcher, requests, num_clients, seconds)

    with ExitStack() as patches:
        if turns:
            patches.enter_context(patch("service.app.Worker", TurnTakingWorker))
            patches.enter_context(
                patch("service.running.room.most_at_once", lambda shape, max_batch_size: max_batch_size)
            )
            patches.enter_context(patch.object(Job, "place", property(lambda job: job.created_at)))
        return asyncio.run(run())


def rows_of(runs: Mapping[bool, Sequence[Receipts]], budgets: Sequence[Preset], seconds: float) -> list[TableRow]:
    """A row for each budget and scheduler; ratios stand in those of the service's."""
    rows: list[TableRow] = []
    per_second = {
        turns: sum(len(of) for run in of_scheduler for of in run.values()) / seconds / len(of_scheduler)
        for turns, of_scheduler in runs.items()
    }
    for budget in budgets:
        means: dict[bool, dict[str, float]] = {}
        for turns, of_scheduler in runs.items():
            receipts = [receipt for run in of_scheduler for receipt in run[budget]]
            means[turns] = {
                part: statistics.mean(getattr(receipt.seconds, part) for receipt in receipts) for part in _PARTS
            }
            row: TableRow = {"budget": budget.value, "scheduler": "turns" if turns else "ours", "images": len(receipts)}
            row |= means[turns] | {"batch": statistics.mean(receipt.batch_size_mean for receipt in receipts)}
            row["ratio"] = None if turns else means[False]["total"] / means[True]["total"]
            row["per_second"] = per_second[turns]
            rows.append(row | {"throughput_ratio": None if turns else per_second[False] / per_second[True]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/tiny-flux"))
    parser.add_argument("--router-weights", type=Path, default=Path("router_weights"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each scheduler in each round")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--side", type=int, default=128)
    budgets = [Preset.EXACT, Preset.EXACT, Preset.FAST, Preset.DRAFT]
    parser.add_argument("--budgets", type=Preset, nargs="+", default=budgets, help="drawn from for each request")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = load_engine([arguments.model], device="cpu", router_weights=arguments.router_weights)
    model = arguments.model.name
    requests = [
        requests_for(engine, model, [scene], PresetBudget(budget), arguments.side)[0]
        for scene, budget in zip(complex_scenes(len(arguments.budgets)), arguments.budgets, strict=True)
    ]
    runs: dict[bool, list[Receipts]] = {True: [], False: []}
    for number in tqdm(range(arguments.rounds), desc="rounds"):
        for turns in (True, False) if number % 2 else (False, True):
            runs[turns].append(serve(engine, requests, arguments.clients, arguments.seconds, turns=turns))
    rows = rows_of(runs, list(dict.fromkeys(arguments.budgets)), arguments.seconds)
    show(f"Seconds from arrival to result, {arguments.clients} clients, {model}", rows)
    result = {
        "benchmark": "scheduling",
        "model": model,
        "clients": arguments.clients,
        "side": arguments.side,
        "environment": environment(),
        "rows": rows,
    }
    finish(result, arguments.json)


if __name__ == "__main__":
    main()
