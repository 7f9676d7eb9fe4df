"""What the sections of the benchmark are made of."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.real_size.subjects import IMAGE_MODELS, Scale, Subject
from benchmarks.table import TableRow


@dataclass(frozen=True, slots=True)
class Table:
    title: str
    rows: Sequence[TableRow]


@dataclass(slots=True)
class Setting:
    """Where a section runs. Rounds beyond the least do not begin after `cap_s` seconds from its start."""

    device: torch.device
    dtype: torch.dtype
    is_reduced: bool
    cap_s: float
    _began: float = field(default_factory=time.monotonic)

    def has_time(self, share: float = 1.0) -> bool:
        """Whether less than this share of the section's time has passed."""
        return time.monotonic() - self._began < share * self.cap_s

    def image_models(self, **options: Any) -> Iterator[tuple[Subject, Scale, Callable[[], bool]]]:
        """Each model, its scale, and whether there is time left of its part. The next one takes its place."""
        for number, model in enumerate(IMAGE_MODELS.values(), 1):
            scale = model.reduced if self.is_reduced else model.full
            share = number / len(IMAGE_MODELS)
            yield model.build(scale, self.device, self.dtype, **options), scale, partial(self.has_time, share)
            self.free()

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the benchmark that needs no other. `cap_s` is the time that it takes at most on an H200."""

    name: str
    cap_s: float
    run: Callable[[Setting], Iterator[Table]]
