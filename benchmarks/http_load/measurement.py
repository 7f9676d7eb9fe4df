"""The measurements, in turns of the contenders. Each figure is kept at once, so that a run can go on later."""

import io
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import httpx2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.engine import requests_for
from benchmarks.frontier.records import Records
from benchmarks.http_load.bare import BarePipeline
from benchmarks.http_load.clients import Answer, Call, call_at_times, call_in_turn, use_core
from benchmarks.http_load.contenders import BATCHING, FEWER_STEPS, LOCK, OURS, Servers, stock_models
from benchmarks.http_load.mix import (
    KINDS,
    MODELS,
    NUM_DEADLINES,
    SMALL,
    Kind,
    Task,
    burst_arrivals,
    exact_tasks,
    mixed_tasks,
    poisson_arrivals,
    without_deadlines,
)
from models.curve import Preset
from models.engine import Engine
from models.request import PresetBudget
from training.scenes.prompts import evaluation_scenes

LEVELS = (0.5, 0.9, 1.5)
"""Rates of arrivals over the contender's own throughput at saturation."""
POISSON, BURSTS = "poisson", "bursts"
_MAX_BACKLOG = 40
"""What our servers accept, in small exact images. With the default of two minutes, a short run would not fill them."""
BURST_LEVEL, _BURST = 0.9, 1.5
"""Bursts come at this rate on average. Each has so many times the work that our servers accept at once."""
MIX, EXACT_ALONE = "mix", "exact alone"
ASKED_FOR_EXACT = (LOCK, BATCHING, OURS)
"""The contenders that are compared where all requests are exact; the others would do the same."""
_WINDOWS_S, _SIZES = (0.02, 0.2), (4, 8)
"""The settings of request-level batching that are tried."""
_NUM_CLIENTS = 16
_NUM_PROMPTS = 64
_SEED = 1

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured: numbers of requests, and seconds in which requests arrive.

    `our_seconds` are those for our server, whose deadlines and refusals are counted. Of ten requests that arrive,
    `num_deadlines` have a deadline.
    """

    num_mixed: int
    num_exact: int
    num_rounds: int
    num_tuning: int
    num_alone: int
    num_samples: int
    seconds: float
    our_seconds: float
    num_deadlines: int = NUM_DEADLINES


class Measurement:
    """Used as a context manager, in which its processes live. Servers use one core, and clients another one.

    `key` is part of the keys of all figures.
    """

    def __init__(
        self,
        engine: Engine,
        sizes: Sizes,
        records: Records,
        key: Mapping[str, str],
        *,
        logs: Path,
        cores: Sequence[int],
    ) -> None:
        self._engine, self._sizes, self._records, self._key = engine, sizes, records, key
        server_core, client_core = cores
        stock = stock_models(engine, {model: Path("checkpoints") / model for model in MODELS})
        self._bare = BarePipeline(stock, server_core)
        self._clients = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), use_core, (client_core,))
        self._scenes = evaluation_scenes(_NUM_PROMPTS // 2, _NUM_PROMPTS // 2)
        self._prompts = {
            model: [request.prompt for request in requests_for(engine, model, self._scenes, PresetBudget(Preset.EXACT))]
            for model in MODELS
        }
        self.max_backlog_s = _MAX_BACKLOG * self.bare_seconds[SMALL]
        self._servers = Servers(stock, logs, server_core, max_backlog_s=self.max_backlog_s, warm_up=self._warm_up)
        self._references: dict[int, NDArray[np.uint8]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._servers.stop()
        self._clients.shutdown()
        self._bare.close()

    @cached_property
    def bare_seconds(self) -> Mapping[Kind, float]:
        """The time of the bare pipeline for each kind of image, from which deadlines follow."""

        def measure() -> Figures:
            seconds = self._bare.seconds_of_kinds(self._mixed(40))
            return {"seconds": [seconds[kind] for kind in KINDS]}

        return dict(zip(KINDS, self._kept(measure, what="bare pipeline")["seconds"], strict=True))

    @cached_property
    def tuning(self) -> Sequence[Figures]:
        """The throughput of request-level batching at each of its settings."""
        settings = [{"window_s": window_s, "max_size": size} for window_s in _WINDOWS_S for size in _SIZES]
        return [self._kept(partial(self._tuned, setting), what="tuning", **setting) for setting in settings]

    @property
    def batching(self) -> Figures:
        """The best settings of request-level batching."""
        best = max(self.tuning, key=lambda figures: float(figures["throughput"]))
        return {name: best[name] for name in ("window_s", "max_size")}

    def saturation(self, name: str, load: str, number: int) -> Figures:
        """Throughput when many clients wait for answers and then go on, in round `number`.

        The first round of the mix also keeps the similarity of its first results to the exact ones.
        """
        return self._kept(
            lambda: self._saturated(name, load, number), what="saturation", name=name, load=load, n=number
        )

    def throughput(self, name: str, load: str) -> float:
        """The median over rounds."""
        rounds = [self.saturation(name, load, number)["throughput"] for number in range(self._sizes.num_rounds)]
        return float(np.median(rounds))

    def alone(self) -> Sequence[Figures]:
        """Seconds of exact requests of one client, each next to those of the bare pipeline."""

        def measure(task: Task) -> Figures:
            bare_s = self._bare.seconds(task)
            (answer,) = self._in_turn(OURS, [Call(task.number, task.body(self.bare_seconds))], 1)
            return {"bare_s": bare_s, "seconds": answer.seconds}

        tasks = exact_tasks(self._prompts, self._sizes.num_alone)
        return [self._kept(partial(measure, task), what="alone", n=task.number) for task in tasks]

    def under_load(self, name: str, level: float, pattern: str) -> Figures:
        """Answers to an open loop of the whole mix, at `level` times the contender's throughput at saturation."""
        return self._kept(
            lambda: self._loaded(name, level, pattern), what="load", name=name, level=level, pattern=pattern
        )

    def _kept(self, measure: Callable[[], Figures], **key: str | float) -> Figures:
        """The figures of an earlier run with this key, or those measured now."""
        full = {**self._key, **key}
        figures = self._records.get(full)
        if figures is None:
            figures = measure()
            self._records.add(full, figures)
        return figures

    def _mixed(self, count: int, num_deadlines: int = NUM_DEADLINES) -> list[Task]:
        return mixed_tasks(self._prompts, count, _SEED, num_deadlines)

    def _warm_up(self, url: str) -> None:
        tasks = without_deadlines(self._mixed(20))
        chosen = [next(task for task in tasks if task.kind == kind) for kind in KINDS]
        calls = [Call(task.number, task.body({})) for task in chosen]
        self._clients.submit(call_in_turn, url, calls, len(calls)).result()

    def _in_turn(self, name: str, calls: Sequence[Call], num_clients: int) -> list[Answer]:
        return self._clients.submit(call_in_turn, self._url(name), calls, num_clients).result()

    def _url(self, name: str) -> str:
        """The address of a contender. Batching has its best settings there."""
        if name in (BATCHING, FEWER_STEPS) and not self._servers.is_running(name):
            httpx2.put(f"{self._servers.url(name)}/batching", params=self.batching).raise_for_status()
        return self._servers.url(name)

    def _tuned(self, setting: Figures) -> Figures:
        url = self._servers.url(BATCHING)
        httpx2.put(f"{url}/batching", params=setting).raise_for_status()
        tasks = without_deadlines(self._mixed(self._sizes.num_tuning))
        calls = [Call(task.number, task.body({})) for task in tasks]
        answers = self._clients.submit(call_in_turn, url, calls, _NUM_CLIENTS).result()
        return {**setting, "throughput": _throughput(answers)}

    def _saturated(self, name: str, load: str, number: int) -> Figures:
        is_mix = load == MIX
        tasks = without_deadlines(self._mixed(self._sizes.num_mixed))
        if not is_mix:
            tasks = exact_tasks(self._prompts, self._sizes.num_exact)
        num_samples = self._sizes.num_samples if is_mix and number == 0 else 0
        calls = [Call(task.number, task.body({}), keeps_file=task.number < num_samples) for task in tasks]
        answers = self._in_turn(name, calls, _NUM_CLIENTS)
        samples = [
            {
                "similarity": self._similarity(tasks[answer.number], answer.file),
                "promised": answer.receipt and answer.receipt["quality_applied"],
                "budget": tasks[answer.number].budget,
            }
            for answer in answers
            if answer.file is not None
        ]
        return {"throughput": _throughput(answers), "samples": samples}

    def _loaded(self, name: str, level: float, pattern: str) -> Figures:
        rate = level * self.throughput(name, MIX)
        seconds = self._sizes.our_seconds if name == OURS else self._sizes.seconds
        if pattern == BURSTS:
            times = burst_arrivals(rate, seconds, max(1, round(rate / level * _BURST * self.max_backlog_s)))
        else:
            times = poisson_arrivals(rate, seconds, _SEED)
        tasks = self._mixed(len(times), self._sizes.num_deadlines)
        calls = [Call(task.number, task.body(self.bare_seconds), at) for task, at in zip(tasks, times, strict=True)]
        answers = self._clients.submit(call_at_times, self._url(name), calls).result()
        entries = []
        for answer in answers:
            task, entry = tasks[answer.number], asdict(answer)
            del entry["file"]
            entries.append({**entry, "budget": task.budget, "latency_s": task.latency_s(self.bare_seconds)})
        return {"rate": rate, "answers": entries}

    def _similarity(self, task: Task, file: bytes) -> float:
        """The similarity of an answer to the exact result of the same seed."""
        pixels = np.asarray(Image.open(io.BytesIO(file)))
        if task.number not in self._references:
            self._references[task.number] = self._exact(task)
        return self._engine.similarity(task.kind.model, pixels, self._references[task.number])

    def _exact(self, task: Task) -> NDArray[np.uint8]:
        model, side = task.kind
        scene = self._scenes[task.number % len(self._scenes)]
        (request,) = requests_for(self._engine, model, [scene], PresetBudget(Preset.EXACT), side)
        state = self._engine.start(replace(request, seed=task.number))
        while not state.is_done:
            self._engine.step([state])
        return np.asarray(self._engine.finish(state))


def _throughput(answers: Sequence[Answer]) -> float:
    """Requests a second, from the first call to the last answer."""
    return len(answers) / max(answer.ended for answer in answers)
