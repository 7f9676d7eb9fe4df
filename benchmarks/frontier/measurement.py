"""Measures one contender in a process of its own: quality and compute, or time beside the stock loop."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.frontier.contenders import contenders
from benchmarks.frontier.subjects import Denoise, ImageSubject, MeshSubject, in_batches, load_subject

Report = Callable[[dict[str, Any]], object]
"""Takes the figures of one setting, or `{"made": n}` for n more results."""

_BATCH_SIZE = 8
_NUM_COUNTED = 4


@dataclass(frozen=True, slots=True)
class Workplace:
    """The model, and where the exact results are kept."""

    directory: Path
    router_weights: Path
    exact_file: Path

    def load(self) -> ImageSubject | MeshSubject:
        torch.set_num_threads(1)
        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()  # the stock pipeline warns at every call
        return load_subject(self.directory, self.router_weights)


def measure_exact(workplace: Workplace, num_prompts: int) -> None:
    """Write the samples that quality compares with, and the stock loop's operations and seconds per result.

    The samples are those of the stock loop at full steps, which our `exact` equals.
    """
    subject = workplace.load()
    prepare, requests = subject.stock(), subject.requests(num_prompts)
    samples: list[NDArray[Any]] = []
    started = time.perf_counter()
    for batch in in_batches(requests, _BATCH_SIZE):
        samples += subject.quality_samples(batch, prepare(batch)())
    seconds = (time.perf_counter() - started) / num_prompts
    flops = statistics.mean(count_flops(prepare([request])) for request in _spread(requests))
    workplace.exact_file.parent.mkdir(parents=True, exist_ok=True)
    with workplace.exact_file.open("wb") as file:
        np.savez_compressed(file, samples=np.stack(samples), flops=flops, seconds=seconds)


def measure_quality(workplace: Workplace, name: str, labels: Sequence[str], num_prompts: int, report: Report) -> None:
    """For each setting, quality per prompt and mean compute of some prompts over the stock loop's.

    One request at a time where the rows of a batch decide together.
    """
    subject = workplace.load()
    contender = contenders(subject.card)[name]
    requests = subject.requests(num_prompts)
    with np.load(workplace.exact_file) as file:
        exact, stock_flops = file["samples"], float(file["flops"])
    batch_size = 1 if contender.decides_per_batch else _BATCH_SIZE
    for label in labels:
        prepare = contender.attach(subject, contender.settings[label])
        samples: list[NDArray[Any]] = []
        for batch in in_batches(requests, batch_size):
            samples += subject.quality_samples(batch, prepare(batch)())
            report({"made": len(batch)})
        quality = [subject.engine.similarity(subject.model, a, b) for a, b in zip(samples, exact, strict=True)]
        flops = statistics.mean(count_flops(prepare([request])) for request in _spread(requests))
        report({"setting": label, "quality": quality, "compute_ratio": flops / stock_flops})


def measure_time(
    workplace: Workplace,
    name: str,
    labels: Sequence[str],
    side: int | None,
    batch_size: int,
    num_rounds: int,
    report: Report,
) -> None:
    """For each setting, denoise seconds over the stock loop's, one ratio per round.

    The stock loop and all settings take turns in every round, on the same requests. One more round warms up.
    """
    subject = workplace.load()
    contender = contenders(subject.card)[name]
    runners = {"stock": subject.stock()}
    runners |= {label: contender.attach(subject, contender.settings[label]) for label in labels}
    requests = subject.requests(batch_size * (num_rounds + 1), side)
    seconds: dict[str, list[float]] = {label: [] for label in runners}
    order = [*runners]
    for number in range(num_rounds + 1):
        first = number % len(order)  # so that no setting always follows the same one
        for label in (*order[first:], *order[:first]):
            denoise = runners[label](requests[number :: num_rounds + 1])
            started = time.perf_counter()
            denoise()
            seconds[label].append(time.perf_counter() - started)
            report({"made": batch_size})
    stock = seconds["stock"]
    for label in labels:
        ratios = [own / of_stock for own, of_stock in zip(seconds[label][1:], stock[1:], strict=True)]
        report({"setting": label, "time_ratios": ratios, "stock_seconds": statistics.median(stock[1:])})


def count_flops(denoise: Denoise) -> int:
    """Floating-point operations of matrix products and attention. Counting makes the run two or three times as long."""

    def of_attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    # The counter does not know the attention of CPUs.
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: of_attention}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        denoise()
    total: int = counter.get_total_flops()
    return total


def _spread(requests: Sequence[Any]) -> Sequence[Any]:
    """A few of the requests, of both halves."""
    return requests[:: max(len(requests) // _NUM_COUNTED, 1)][:_NUM_COUNTED]
