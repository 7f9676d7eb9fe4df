"""The stock pipelines without a server, in a process of their own."""

import multiprocessing
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

import torch

from benchmarks.http_load.clients import use_core
from benchmarks.http_load.mix import EXACT, KINDS, Kind, Task
from benchmarks.http_load.stock_server import Call, Pipelines, StockModel, png_of

_NUM_RUNS = 3


class BarePipeline:
    """Runs on `core`, with one thread."""

    def __init__(self, models: Mapping[str, StockModel], core: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, context, _load_pipelines, (models, core))

    def close(self) -> None:
        self._process.shutdown()

    def seconds(self, task: Task) -> float:
        """The time from the prompt to the PNG file, with all denoise steps."""
        return self._process.submit(_time_call, task).result()

    def seconds_of_kinds(self, tasks: Sequence[Task]) -> dict[Kind, float]:
        """The median time of each kind."""
        of_kind = {kind: next(task for task in tasks if task.kind == kind) for kind in KINDS}
        runs = {kind: [self.seconds(task) for _ in range(_NUM_RUNS + 1)][1:] for kind, task in of_kind.items()}
        return {kind: statistics.median(times) for kind, times in runs.items()}


_models: Mapping[str, StockModel]
_pipelines: Pipelines


def _load_pipelines(models: Mapping[str, StockModel], core: int) -> None:
    global _models, _pipelines
    use_core(core)
    torch.set_num_threads(1)
    _models = models
    _pipelines = Pipelines(models)


def _time_call(task: Task) -> float:
    side = task.kind.side
    call = Call(task.kind.model, f"{side}x{side}", _models[task.kind.model].steps[EXACT])
    began = time.perf_counter()
    (image,) = _pipelines.images(call, [task.prompt], [task.number])
    png_of(image)
    return time.perf_counter() - began
