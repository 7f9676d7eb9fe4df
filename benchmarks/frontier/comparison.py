"""The comparison on one model: what is left to measure, in which processes, and the tables made of the figures."""

import importlib.util
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.frontier.bootstrap import Bootstrap, Measured, estimate, headline
from benchmarks.frontier.contenders import PRESETS, Contender, contenders
from benchmarks.frontier.measurement import Workplace, measure_exact, measure_quality, measure_time
from benchmarks.frontier.records import Key, Records, hash_of
from benchmarks.frontier.workers import Job, run
from benchmarks.table import TableRow
from models.card import MeshCard
from models.zoo import load_engine

_MEAN_TIME = 0.45
"""Of a setting, over the stock loop's. It serves to say beforehand how long a run takes."""


@dataclass(frozen=True, slots=True)
class Options:
    """`contenders` are the names of those to compare, all if empty. `sides` in pixels and `batch_sizes` are of times.

    The first batch size is that of the tables of quality against time. Times are also measured at each of `sides`; none
    of them is the model's default.
    """

    out: Path
    router_weights: Path
    contenders: Sequence[str]
    num_prompts: int
    num_rounds: int
    sides: Sequence[int]
    batch_sizes: Sequence[int]
    num_processes: int


@dataclass(frozen=True, slots=True)
class Task:
    """A job in a process, the key of each setting it reports, and how many results it makes."""

    job: Job
    key_of: Callable[[str], Key]
    num_results: int


class Comparison:
    def __init__(self, directory: Path, options: Options) -> None:
        self.model, self.options = directory.name, options
        card = load_engine([directory], device="cpu", router_weights=options.router_weights).cards[self.model]
        self.is_of_meshes = isinstance(card, MeshCard)
        self.num_prompts = options.num_prompts // 2 if self.is_of_meshes else options.num_prompts
        self.records = Records(options.out / "records.jsonl")
        self.weights = hash_of(directory)
        self.our_weights = hash_of(directory, options.router_weights / self.model)
        self.left_out: dict[str, str] = {}
        self.contenders = {name: each for name, each in contenders(card).items() if self._takes_part(each)}
        exact_file = options.out / f"exact-{self.model}-{self.weights}-{self.num_prompts}.npz"
        self.workplace = Workplace(directory, options.router_weights, exact_file)

    def _takes_part(self, contender: Contender) -> bool:
        if self.is_of_meshes and not contender.fits_meshes:
            self.left_out[contender.name] = "hooks into transformers of diffusers, which Hunyuan3D is not"
        elif contender.needs and importlib.util.find_spec(contender.needs) is None:
            self.left_out[contender.name] = f"{contender.needs} is not installed: it is in the extra 'peers'"
        else:
            return not self.options.contenders or contender.name in self.options.contenders
        return False

    def measure(self) -> None:
        """Measure what the records lack, with a bar that says how much time is left."""
        if not self.workplace.exact_file.exists():
            print(f"{self.model}: the results at full steps", flush=True)
            spawned = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, spawned) as pool:
                pool.submit(measure_exact, self.workplace, self.num_prompts).result()
        with np.load(self.workplace.exact_file) as file:
            stock_s = float(file["seconds"])
        quality, times = self._quality_tasks(), self._time_tasks()
        minutes = [stock_s * sum(task.num_results for task in tasks) / 60 for tasks in (quality, times)]
        minutes[0] *= _MEAN_TIME / self.options.num_processes
        print(f"{self.model}: about {minutes[0]:.0f} min for quality, {minutes[1]:.0f} for times", flush=True)
        # The longest first, so that no process is idle at the end.
        self._run(sorted(quality, key=lambda task: -task.num_results), self.options.num_processes, "quality")
        self._run(times, 1, "time")

    def _quality_tasks(self) -> list[Task]:
        tasks = []
        for name in self.contenders:
            key_of = partial(self._quality_key, name)
            if labels := self._missing(name, key_of):
                job = partial(measure_quality, self.workplace, name, labels, self.num_prompts)
                tasks.append(Task(job, key_of, self.num_prompts * len(labels)))
        return tasks

    def _time_tasks(self) -> list[Task]:
        tasks = []
        num_rounds = self.options.num_rounds
        for side in self._sides():
            for batch_size in self.options.batch_sizes:
                for name in self.contenders:
                    key_of = partial(self._time_key, name, side, batch_size)
                    if labels := self._missing(name, key_of):
                        job = partial(measure_time, self.workplace, name, labels, side, batch_size, num_rounds)
                        tasks.append(Task(job, key_of, batch_size * (num_rounds + 1) * (1 + len(labels))))
        return tasks

    def _sides(self) -> list[int | None]:
        return [None] if self.is_of_meshes else [None, *self.options.sides]

    def _missing(self, name: str, key_of: Callable[[str], Key]) -> list[str]:
        return [label for label in self.contenders[name].settings if self.records.get(key_of(label)) is None]

    def _run(self, tasks: Sequence[Task], num_processes: int, title: str) -> None:
        if not tasks:
            return
        total = sum(task.num_results for task in tasks)
        with tqdm(total=total, desc=f"{self.model} {title}", unit="result", smoothing=0.05) as bar:

            def take(index: int, figures: dict[str, Any]) -> None:
                if "made" in figures:
                    bar.update(figures["made"])
                else:
                    self.records.add(tasks[index].key_of(figures.pop("setting")), figures)

            run([task.job for task in tasks], num_processes, take)

    def _quality_key(self, name: str, setting: str) -> Key:
        return self._key(name, setting) | {"kind": "quality", "prompts": self.num_prompts}

    def _time_key(self, name: str, side: int | None, batch_size: int, setting: str) -> Key:
        how = {"side": side, "batch_size": batch_size, "rounds": self.options.num_rounds}
        return self._key(name, setting) | {"kind": "time"} | how

    def _key(self, name: str, setting: str) -> dict[str, str | int | None]:
        weights = self.our_weights if self.contenders[name].is_ours else self.weights
        return {"model": self.model, "weights": weights, "contender": name, "setting": setting}

    def settings(self) -> list[TableRow]:
        """A row for every setting: time, compute, quality and its tenth percentile, with intervals; further times."""
        bootstrap = Bootstrap(self.num_prompts)
        rows: list[TableRow] = []
        for name, contender in self.contenders.items():
            for label in contender.settings:
                measured = self._measured(name, label)
                time = estimate(*bootstrap.median_time(measured))
                mean = estimate(*bootstrap.mean_quality(measured))
                tenth = estimate(*bootstrap.tenth_percentile(measured))
                row: TableRow = {"contender": name, "setting": label, "time": time.value}
                row |= {"time_low": time.low, "time_high": time.high}
                row |= self._further_times(name, label)
                row["compute"] = self._figures(self._quality_key(name, label))["compute_ratio"]
                row |= {"quality": mean.value, "quality_low": mean.low, "quality_high": mean.high}
                row |= {"p10": tenth.value, "p10_low": tenth.low, "p10_high": tenth.high}
                rows.append(row)
        return rows

    def headline(self) -> list[TableRow]:
        """For each contender and quality, the least time; it is marked if it is but an upper bound."""
        measured = {
            name: [self._measured(name, label) for label in contender.settings]
            for name, contender in self.contenders.items()
        }
        return headline(measured, PRESETS, self.num_prompts)

    def _measured(self, name: str, label: str) -> Measured:
        quality = self._figures(self._quality_key(name, label))["quality"]
        times = self._figures(self._time_key(name, None, self.options.batch_sizes[0], label))["time_ratios"]
        return Measured(np.array(quality), np.array(times))

    def _further_times(self, name: str, label: str) -> TableRow:
        first = (None, self.options.batch_sizes[0])
        return {
            f"time_{f'{side}px_' if side else ''}batch_{batch_size}": float(
                np.median(self._figures(self._time_key(name, side, batch_size, label))["time_ratios"])
            )
            for side in self._sides()
            for batch_size in self.options.batch_sizes
            if (side, batch_size) != first
        }

    def _figures(self, key: Key) -> dict[str, Any]:
        figures = self.records.get(key)
        assert figures is not None
        return figures
