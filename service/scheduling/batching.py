"""Who takes the next denoise step together, so that light requests need not wait for dense ones."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from models.request import GenerationRequest, ImageRequest
from service.scheduling.cost import BlockSeconds

_TOLERANCE = 1.1  # for predictions


@dataclass(frozen=True, slots=True)
class Candidate:
    """A started result. Those of one `batch_key` can share a step.

    `virtual_time` is what it has had of the device so far, see `FairShare`. `expected_runs` says how many of its rows
    the coming step will probably run in each block, which take `block_seconds`.
    """

    batch_key: Hashable
    virtual_time: float
    expected_runs: Sequence[float]
    block_seconds: BlockSeconds

    @property
    def step_seconds(self) -> float:
        """Predicted for a step alone."""
        return _Step(self).seconds


class _Step:
    """A step's predicted time, as its batch grows: every row that runs, and every block that anybody runs."""

    def __init__(self, first: Candidate) -> None:
        self._cost = first.block_seconds
        self._idle = [1.0] * len(first.expected_runs)  # how probably nobody runs a block
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


def form_groups(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Indices of the candidates in groups that share a step, the one whose turn it is first.

    The leader of a group has the least virtual time. Others join it, the most alike first, as long as the leader's step
    ends no later than its fair share of the device would let it: n members take at most n times what it takes alone. So
    requests of like sparsity go together, a light one may join a dense one's step, which it would have to wait for, but
    dense ones join light ones only where batching makes up for it. Any first part of a group is a group too.
    """
    left = sorted(range(len(candidates)), key=lambda index: candidates[index].virtual_time)
    seconds = {index: candidates[index].step_seconds for index in left}
    groups = []
    while left:
        leader = left[0]
        step, group = _Step(candidates[leader]), [leader]
        peers = [index for index in left[1:] if candidates[index].batch_key == candidates[leader].batch_key]
        for index in sorted(peers, key=lambda index: abs(seconds[index] - seconds[leader])):
            share = (len(group) + 1) * seconds[leader]
            if step.seconds_with(candidates[index]) <= _TOLERANCE * share:
                step.join(candidates[index])
                group.append(index)
        groups.append(group)
        left = [index for index in left if index not in group]
    return groups


class FairShare:
    """Fair shares of the device, as virtual times: the seconds of a step are divided by what its members need alone.

    Seconds count less the greater a request's weight. A new one begins with the virtual time of the last leader
    (self-clocked fair queueing, Golestani 1994, https://doi.org/10.1109/INFCOM.1994.337677), so it neither makes up for
    time before it came nor is overtaken by those who come later: nobody starves.
    """

    def __init__(self) -> None:
        self.at_start = 0.0
        """Virtual time of one that starts now."""

    def after_step(self, members: Sequence[Candidate], weights: Sequence[float], seconds: float) -> list[float]:
        """The members' virtual times after a step that took `seconds`; its leader comes first."""
        needed = [member.step_seconds for member in members]
        virtual_times = [
            member.virtual_time + seconds * own / sum(needed) / weight
            for member, own, weight in zip(members, needed, weights, strict=True)
        ]
        self.at_start = max(self.at_start, virtual_times[0])
        return virtual_times


def shape_of(request: GenerationRequest) -> str:
    """Requests of equal shape can share steps: a request's `batch_key` before it is started."""
    match request:
        case ImageRequest():
            return f"{request.model} {request.width}x{request.height}"
        case _:
            return request.model
