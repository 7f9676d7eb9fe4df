"""Which requests share the next denoise step, so that light requests do not wait for dense ones."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from models.request import GenerationRequest, ImageEdit, ImageRequest
from service.scheduling.cost import BlockSeconds

_TOLERANCE = 1.1  # predictions may be off by this factor


@dataclass(frozen=True, slots=True)
class Candidate:
    """A started result. Candidates with one `batch_key` can share a step.

    `virtual_time` is its share of the device time so far, and `weight` how much of it it gets, see `FairShare`.
    `expected_runs` is the expected number of its rows that each block runs in the next step; `block_seconds` is what a
    block takes. Those that are not `is_high` keep out of the others' way.
    """

    batch_key: Hashable
    virtual_time: float
    expected_runs: Sequence[float]
    block_seconds: BlockSeconds
    weight: float = 1.0
    is_high: bool = False

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
    candidates: Sequence[Candidate], *, high_first: bool = True, most_growth: float = math.inf
) -> list[list[int]]:
    """Group the candidates that share steps, as lists of indices. The first group goes next.

    The request that has had the least device time leads a group. Others join it, the most similar in predicted time
    first, while the step ends no later than the leader would in its share of the device: with n members of equal
    weight, n times its time alone. So requests of similar sparsity go together. A light request may join a dense one's
    step, since it would wait for that step anyway. A dense request joins a light one only where batching makes up for
    it. Any prefix of a group is a valid group.

    Those of high priority lead before all others if `high_first`, else after them. A step takes at most `most_growth`
    times as long as its leader's alone.
    """
    left = sorted(
        range(len(candidates)),
        key=lambda index: (candidates[index].is_high != high_first, candidates[index].virtual_time),
    )
    seconds = {index: candidates[index].step_seconds for index in left}
    groups = []
    while left:
        leader = left[0]
        step, group, weight = _Step(candidates[leader]), [leader], candidates[leader].weight
        peers = [index for index in left[1:] if candidates[index].batch_key == candidates[leader].batch_key]
        for index in sorted(peers, key=lambda index: abs(seconds[index] - seconds[leader])):
            with_it = weight + candidates[index].weight
            most = min(_TOLERANCE * with_it / candidates[leader].weight, most_growth) * seconds[leader]
            if step.seconds_with(candidates[index]) <= most:
                step.join(candidates[index])
                group.append(index)
                weight = with_it
        groups.append(group)
        left = [index for index in left if index not in group]
    return groups


class FairShare:
    """Fair shares of the device, kept as virtual times.

    A step's seconds are split over its members in proportion to what each needs alone, and divided by its weight. A new
    request starts at the virtual time of the last leader (self-clocked fair queueing, Golestani 1994,
    https://doi.org/10.1109/INFCOM.1994.337677). So it gets nothing for the time before its arrival, later arrivals
    cannot overtake it, and no request starves.
    """

    def __init__(self) -> None:
        self.at_start = 0.0
        """The virtual time of a request that starts now."""

    def after_step(self, members: Sequence[Candidate], seconds: float) -> list[float]:
        """The members' virtual times after a step of `seconds`. `members` begins with the leader."""
        needed = [member.step_seconds for member in members]
        virtual_times = [
            member.virtual_time + seconds * own / sum(needed) / member.weight
            for member, own in zip(members, needed, strict=True)
        ]
        self.at_start = max(self.at_start, virtual_times[0])
        return virtual_times


def shape_of(request: GenerationRequest) -> str:
    """Requests of equal shape can share steps: they have one `batch_key`, but this needs no engine.

    Exact ones share none, but they have a shape too, so that not too many of it run at a time.
    """
    return _size_of(request) + " exact" * request.wants_exact


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
