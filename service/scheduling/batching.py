"""Which requests share the next denoise step, so that light requests do not wait for dense ones."""

import math
from bisect import insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from models.request import GenerationRequest, ImageEdit, ImageRequest
from service.scheduling.cost import BlockSeconds

_TOLERANCE = 1.1  # predictions may be off by this factor
_LEAST_SAVING = 0.1
"""How much time a request must save to join another's step, over its own step: it delays all others in that step."""
_LIGHT = 0.25
"""The largest share of its schedule's steps that a light request computes."""
_LIGHT_SUFFIX, _EXACT_SUFFIX = " light", " exact"
_MOST_EXACT = 2
"""Exact requests run one after the other. While one does, the next one is encoded."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A started result. Candidates with one `batch_key` can share a step.

    The one with the lowest `turn` goes next, and `weight` is its share of the device, see `FairShare`. Its deadline
    allows others to have the device for `slack_s` predicted seconds before its next step.
    `expected_runs` is the expected number of its rows that each block runs in the next step; `block_seconds` is what a
    block takes. Those that are not `is_high` keep out of the others' way.
    """

    batch_key: Hashable
    turn: float
    expected_runs: Sequence[float]
    block_seconds: BlockSeconds
    weight: float = 1.0
    is_high: bool = False
    slack_s: float = math.inf

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a step without others."""
        return _Step(self).seconds


class _Step:
    """The predicted time of a step as its batch grows: a cost per row that runs, and per block that any row runs."""

    def __init__(self, first: Candidate) -> None:
        self._cost = first.block_seconds
        self._idle = [1.0] * len(first.expected_runs)  # the probability, per block, that no row runs it
        self._num_rows = 0.0
        self.join(first)

    @property
    def seconds(self) -> float:
        return self._seconds(self._idle, self._num_rows)

    def seconds_with(self, other: Candidate) -> float:
        return self._seconds(self._idle_with(other), self._num_rows + sum(other.expected_runs))

    def join(self, other: Candidate) -> None:
        self._idle = self._idle_with(other)
        self._num_rows += sum(other.expected_runs)

    def _idle_with(self, other: Candidate) -> list[float]:
        return [idle * max(0.0, 1 - runs) for idle, runs in zip(self._idle, other.expected_runs, strict=True)]

    def _seconds(self, idle: Sequence[float], num_rows: float) -> float:
        return self._cost.call * (len(idle) - sum(idle)) + self._cost.row * num_rows


def form_groups(
    candidates: Sequence[Candidate],
    *,
    high_first: bool = True,
    deadlines_first: bool = True,
    most_growth: float = math.inf,
) -> list[list[int]]:
    """Group the candidates that share steps, as lists of indices. The first group goes next.

    The request whose turn it is leads a group. Others join it, the most similar in predicted time first, while the step
    ends no later than the leader would in its share of the device: with n members of equal weight, n times its time
    alone. So requests of similar sparsity go together. A light request may join a dense one's step, since it would wait
    for that step anyway. A dense request joins a light one only where batching makes up for it. No request joins where
    that saves nothing, as with large images: it would only delay the leader. Any prefix of a group is a valid group.

    Those of high priority lead before all others if `high_first`, else after them. A step takes at most `most_growth`
    times as long as its leader's alone, and no longer than the slack of its members allows. One that has too little
    slack to wait for the first group goes before it, but not before the class that leads. Without `deadlines_first`,
    those with a deadline lead after those of their class without one.
    """
    seconds = [candidate.step_seconds for candidate in candidates]
    order = sorted(
        range(len(candidates)),
        key=lambda index: (
            candidates[index].is_high != high_first,
            not deadlines_first and math.isfinite(candidates[index].slack_s),
            candidates[index].turn,
        ),
    )
    groups = _groups(candidates, seconds, order, most_growth)
    if not deadlines_first or all(math.isinf(candidate.slack_s) for candidate in candidates):
        return groups
    first_s = group_seconds([candidates[index] for index in groups[0]])
    is_high = candidates[groups[0][0]].is_high
    of_class = [index for index in order if candidates[index].is_high == is_high]
    leader = min(of_class, key=lambda index: candidates[index].slack_s)
    if candidates[leader].slack_s >= first_s or leader in groups[0]:
        return groups
    return _groups(candidates, seconds, [leader, *(index for index in order if index != leader)], most_growth)


def group_seconds(group: Sequence[Candidate]) -> float:
    """Predicted seconds of a step that these share."""
    step = _Step(group[0])
    for other in group[1:]:
        step.join(other)
    return step.seconds


def _groups(
    candidates: Sequence[Candidate], seconds: Sequence[float], order: Sequence[int], most_growth: float
) -> list[list[int]]:
    """The groups, where requests lead in this order. `seconds` are those of their steps alone."""
    left, groups = list(order), []
    while left:
        leader = left[0]
        step, group, weight = _Step(candidates[leader]), [leader], candidates[leader].weight
        longest = min(most_growth * seconds[leader], seconds[leader] + candidates[leader].slack_s)
        peers = [index for index in left[1:] if candidates[index].batch_key == candidates[leader].batch_key]
        for index in sorted(peers, key=lambda index: abs(seconds[index] - seconds[leader])):
            with_it = weight + candidates[index].weight
            allowed = min(longest, seconds[index] + candidates[index].slack_s)
            most = min(_TOLERANCE * with_it / candidates[leader].weight * seconds[leader], allowed)
            longer = step.seconds_with(candidates[index])
            if longer <= most and longer - step.seconds <= (1 - _LEAST_SAVING) * seconds[index]:
                step.join(candidates[index])
                group.append(index)
                weight, longest = with_it, allowed
        groups.append(group)
        left = [index for index in left if index not in group]
    return groups


class FairShare:
    """The order of turns: the request that would end first with fair shares of the device goes next.

    A virtual device serves all requests at once, each in proportion to its weight. The real one serves them in the
    order in which the virtual one ends them (fair sojourn protocol, Friedman and Henderson 2003,
    https://doi.org/10.1145/885651.781056). So light requests go first, and yet none ends later than with fair shares,
    but for the step that runs when it arrives. Both devices do the same work: the predicted seconds of each request
    alone. What steps save by being shared makes both of them faster.
    """

    def __init__(self) -> None:
        self._now = 0.0  # the seconds that a request of weight 1 has had, if it was always there
        self._ends: list[tuple[float, float]] = []  # of those that the virtual device serves: when, and their weights

    def join(self, seconds: float, weight: float) -> float:
        """The `Candidate.turn` of a request that comes now and takes so many seconds alone."""
        end = self._now + seconds / weight
        insort(self._ends, (end, weight))
        return end

    def spend(self, seconds: float) -> None:
        """Note that so many seconds of the work that requests joined with are done, or no longer needed."""
        while self._ends and seconds > 0:
            end, _ = self._ends[0]
            weights = sum(weight for _, weight in self._ends)
            needed = (end - self._now) * weights
            if needed > seconds:
                self._now += seconds / weights
                return
            self._now = end
            seconds -= needed
            del self._ends[0]


def shape_of(request: GenerationRequest) -> str:
    """Requests of equal shape can share steps: they have one `batch_key`, but this needs no engine.

    Exact requests share no steps, and light ones share those of heavier ones too. Both have shapes of their own, which
    bounds how many exact ones run at a time, and keeps places for light ones.
    """
    if request.wants_exact:
        # A mesh keeps its place while its field is decoded, and others take steps meanwhile.
        return _size_of(request) + (_EXACT_SUFFIX if isinstance(request, ImageRequest) else " exact mesh")
    is_light = request.num_computed_steps <= _LIGHT * request.num_steps
    return _size_of(request) + _LIGHT_SUFFIX * is_light


def most_at_once(shape: str, max_batch_size: int) -> int:
    """How many requests of a shape may run at once. More exact ones would only wait for each other on the worker."""
    return min(_MOST_EXACT, max_batch_size) if shape.endswith(_EXACT_SUFFIX) else max_batch_size


def step_shape(shape: str) -> str:
    """What requests that can share steps have in common: light ones share them with others."""
    return shape.removesuffix(_LIGHT_SUFFIX)


def is_light(shape: str) -> bool:
    """Whether requests of this shape compute few of their steps."""
    return shape.endswith(_LIGHT_SUFFIX)


def _size_of(request: GenerationRequest) -> str:
    match request:
        case ImageRequest(edit=ImageEdit(strength=None) as edit):
            # Pictures of other sizes may be read at one size; but that only the model knows.
            pictures = " ".join(f"{width}x{height}" for width, height in edit.sizes)
            return f"{request.model} {request.width}x{request.height} {pictures}"
        case ImageRequest():
            return f"{request.model} {request.width}x{request.height}"
        case _:
            return request.model
