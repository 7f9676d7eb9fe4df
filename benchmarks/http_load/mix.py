"""The requests of the benchmark, and when they arrive. Pure, but for the random generators that are passed in.

The mix was chosen before anything was measured, and no contender was tuned to it.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, repeat
from typing import Any, NamedTuple, TypeVar

Name = TypeVar("Name")

_DECK = 10
"""Among so many requests in a row, all shares are exact, so that short runs have the mix too."""
_BUDGETS: Mapping[str, int] = {"exact": 1, "high": 2, "default": 4, "fast": 2, "draft": 1}
"""How many requests of a deck have a budget. The default one, a quality of 0.9, is not written in the body."""
NUM_DEADLINES = 1
"""How many requests of a deck have a deadline in place of their budget."""
_TIGHT, _COMFORTABLE = 0.4, 4.0
"""The least and the most that a deadline allows, over the time of the bare pipeline for this size."""
DEADLINE = "deadline"
EXACT = "exact"


class Kind(NamedTuple):
    """A model and the height and width of its image."""

    model: str
    side: int


SMALL = Kind("tiny-flux", 128)
_KINDS: Mapping[Kind, int] = {SMALL: 8, Kind("tiny-flux", 256): 1, Kind("tiny-qwen-image", 128): 1}
"""How many requests of a deck are of a kind."""
KINDS = (*_KINDS,)
MODELS = tuple(dict.fromkeys(kind.model for kind in KINDS))


@dataclass(frozen=True, slots=True)
class Task:
    """One request of the benchmark. `budget` names a preset, or is "default" or "deadline".

    A deadline allows `allowance` times the time of the bare pipeline for this kind.
    """

    number: int
    kind: Kind
    budget: str
    prompt: str
    allowance: float | None = None

    def latency_s(self, bare_seconds: Mapping[Kind, float]) -> float | None:
        return None if self.allowance is None else self.allowance * bare_seconds[self.kind]

    def body(self, bare_seconds: Mapping[Kind, float]) -> dict[str, Any]:
        """The JSON of the request. `bare_seconds` is the time of the bare pipeline for each kind."""
        body: dict[str, Any] = {
            "model": self.kind.model,
            "prompt": self.prompt,
            "size": f"{self.kind.side}x{self.kind.side}",
            "seed": self.number,
            "response_format": "binary",
        }
        latency_s = self.latency_s(bare_seconds)
        if latency_s is not None:
            return body | {"budget": {"latency_ms": 1000 * latency_s}}
        return body if self.budget == "default" else body | {"budget": {"preset": self.budget}}


def mixed_tasks(
    prompts: Mapping[str, Sequence[str]], count: int, seed: int, num_deadlines: int = NUM_DEADLINES
) -> list[Task]:
    """The first `count` tasks of the mix. `prompts` are those of each model, which are used in turn.

    Of each ten, `num_deadlines` have a deadline in place of their budget.
    """
    rng = random.Random(seed)
    tasks: list[Task] = []
    while len(tasks) < count:
        kinds, budgets = _shuffled(_KINDS, rng), _shuffled(_BUDGETS, rng)
        for place in rng.sample(range(_DECK), num_deadlines):
            budgets[place] = DEADLINE
        for kind, budget in zip(kinds, budgets, strict=True):
            allowance = math.exp(rng.uniform(math.log(_TIGHT), math.log(_COMFORTABLE)))
            number, texts = len(tasks), prompts[kind.model]
            task = Task(number, kind, budget, texts[number % len(texts)])
            tasks.append(replace(task, allowance=allowance) if budget == DEADLINE else task)
    return tasks[:count]


def without_deadlines(tasks: Sequence[Task]) -> list[Task]:
    """The tasks with the default budget in place of deadlines, so that a server has to answer all of them."""
    return [replace(task, budget="default", allowance=None) if task.allowance else task for task in tasks]


def exact_tasks(prompts: Mapping[str, Sequence[str]], count: int) -> list[Task]:
    texts = prompts[SMALL.model]
    return [Task(number, SMALL, EXACT, texts[number % len(texts)]) for number in range(count)]


def poisson_arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of arrivals in `seconds` that do not depend on each other, at `rate` a second on average."""
    rng, times, at = random.Random(seed), [], 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        times.append(at)
    return times


def burst_arrivals(rate: float, seconds: float, size: int) -> list[float]:
    """Times of arrivals in bursts of `size` at once, at `rate` a second on average."""
    every_s = size / rate
    starts = [number * every_s for number in range(max(1, math.ceil(seconds / every_s)))]
    return [start for start in starts for _ in range(size)]


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of the values do not exceed; None of none."""
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, max(0, math.ceil(share * len(values)) - 1))]


def _shuffled(counts: Mapping[Name, int], rng: random.Random) -> list[Name]:
    names = [name for name, count in counts.items() for name in islice(repeat(name), count)]
    rng.shuffle(names)
    return names
