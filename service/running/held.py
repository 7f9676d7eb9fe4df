"""What a worker holds: the jobs that it has taken, and their requests from start to decoded field."""

import math
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from models.card import ModelCard
from models.errors import DeviceLost
from models.memory import RequestMemory
from models.mesh.surface import FieldSamples
from models.request import GenerationRequest
from service.jobs.job import Job, Priority
from service.jobs.store import Claim, JobKind, Progress
from service.scheduling.batching import Candidate, FairShare
from service.scheduling.cost import BlockSeconds, dense_step_seconds, grid_bytes

if TYPE_CHECKING:  # brings torch, which the API side never loads
    from models.families.family import BranchStart, Encoded
    from models.state import DenoiseState

_WEIGHTS = {Priority.LOW: 0.5, Priority.NORMAL: 1.0, Priority.HIGH: 256.0}
_DEADLINE_WEIGHT = 3.0

DECODE_TURN_S = 0.05
"""How long a mesh is decoded before others have their turn. Its fair share of the device does not depend on it."""


class EncodedRequest(NamedTuple):
    """A request that can start, and the seconds that encoding it took."""

    encoded: "Encoded"
    seconds: float


@dataclass(slots=True, eq=False)
class HeldJob:
    """A claimed job. `unstarted` are the indices of its requests that have not started yet.

    `prepared` has those whose input image is prepared first, `encoding` those whose prompt or image is or was encoded.
    `branches` are what they share, once one of them is encoded.

    `num_steps` has the number of computed steps of each request, as things stand; `steps_done` is their sum so far.
    The memory in `kind` is what this worker's device needs for each request.
    """

    claim: Claim
    kind: JobKind
    unstarted: list[int]
    num_steps: list[int]
    prepared: dict[int, Future[GenerationRequest]] = field(default_factory=dict)
    encoding: dict[int, Future[EncodedRequest]] = field(default_factory=dict)
    branches: "Sequence[BranchStart] | None" = None
    began: float = field(default_factory=time.perf_counter)
    steps_done: int = 0

    @property
    def job(self) -> Job:
        return self.claim.job

    @property
    def shape(self) -> str:
        return self.kind.shape

    @property
    def memory(self) -> RequestMemory:
        return self.kind.memory

    @property
    def has_begun(self) -> bool:
        """Whether one of its requests is or was on the device."""
        on_device = [
            stage
            for stage in self.encoding.values()
            if stage.running() or (stage.done() and isinstance(stage.exception(), DeviceLost))
        ]
        return bool(on_device) or len(self.unstarted) < len(self.job.requests)

    def progress(self, states: "Sequence[DenoiseState]", now: float) -> Progress:
        """Its progress, where `states` are those of its running requests, and `now` is as `began`.

        `eta_s` assumes that the steps left to compute take as long as those so far. A mesh's decoding comes on top, as
        it was predicted.
        """
        num_steps = sum(self.num_steps)
        return Progress(
            self.claim,
            steps_done=self.steps_done,
            num_steps=num_steps,
            compute_ratio=sum(state.compute_ratio for state in states) / len(states),
            eta_s=(now - self.began) / self.steps_done * (num_steps - self.steps_done) + self.job.decode_seconds,
        )


@dataclass(slots=True, eq=False)
class Running:
    """Request `index` of a held job between its start and its last step, or the last turn of its `decoding`.

    `denoise_began`, `steps_began` and `denoise_ended` are times of the performance counter: when it started, when its
    first step began, when its last one ended. `turn` says when it is its turn, see `scheduling.batching.FairShare`, and
    `left_s` how much is left of the predicted seconds that this follows from. `batch_size_sum` adds up the batch sizes
    of its computed steps, `predicted_s` their predicted seconds. `pace` is how much longer they took, including the
    steps of other requests between them. Its deadline allows others to have the device for `slack_s` predicted seconds
    before its next step. `num_previews` is how many previews were made.
    """

    held: HeldJob
    index: int
    state: "DenoiseState"
    queue_s: float
    encode_s: float
    denoise_began: float
    block_seconds: BlockSeconds
    turn: float = 0.0
    left_s: float = 0.0
    batch_size_sum: int = 0
    predicted_s: float = 0.0
    pace: float = 1.0
    slack_s: float = math.inf
    num_previews: int = 0
    steps_began: float | None = None
    denoise_ended: float | None = None
    decoding: Generator[None, None, FieldSamples] | None = None

    @property
    def claim(self) -> Claim:
        return self.held.claim

    @property
    def job(self) -> Job:
        return self.held.job

    @property
    def request(self) -> GenerationRequest:
        return self.job.requests[self.index]

    @property
    def memory(self) -> RequestMemory:
        return self.held.memory

    @property
    def grid_bytes(self) -> int:
        """Predicted bytes of its grid, if it is being decoded."""
        return 0 if self.decoding is None else grid_bytes(self.request)

    @property
    def weight(self) -> float:
        """How much of the device it gets, relative to others."""
        weight = _WEIGHTS[self.job.priority]
        return weight if self.job.deadline_at is None else max(weight, _DEADLINE_WEIGHT)

    def join(self, fair_share: FairShare) -> None:
        """Take a place in the order of turns."""
        decode_s = self.job.decode_seconds / len(self.job.requests)
        self.left_s = self.state.num_computed_steps * self.as_candidate().step_seconds + decode_s
        self.turn = fair_share.join(self.left_s, self.weight)

    def spend(self, fair_share: FairShare, seconds: float) -> None:
        """Note that it has had so many of its predicted seconds, or needs no more of them."""
        if self.left_s < seconds / 2:
            # It takes longer than predicted: the rest of it waits as if it came now, so that others do not starve.
            self.left_s = max(seconds, self.predicted_s)
            self.turn = fair_share.join(self.left_s, self.weight)
        spent = min(seconds, self.left_s)
        self.left_s -= spent
        fair_share.spend(spent)

    def measure_pace(self, card: ModelCard, began: float, ended: float) -> None:
        """Note that a step of it began and ended then, by the performance counter.

        Its pace is that of all its steps: once it has its turn, it steps without breaks, except for light requests that
        come.
        """
        self.predicted_s += dense_step_seconds(self.request, card) * self.state.point.relative_step_seconds
        self.steps_began = began if self.steps_began is None else self.steps_began
        self.pace = (ended - self.steps_began) / self.predicted_s

    def as_candidate(self) -> Candidate:
        if self.decoding is not None:
            # Its turn is shared with nobody.
            seconds = BlockSeconds(0.0, DECODE_TURN_S)
            return Candidate(self, self.turn, [1.0], seconds, self.weight, self.job.is_high, self.slack_s)
        runs = self.state.expected_runs
        key, is_high = self.state.batch_key, self.job.is_high
        return Candidate(key, self.turn, runs, self.block_seconds, self.weight, is_high, self.slack_s)


def preview_steps(num_previews: int, num_steps: int) -> list[int]:
    """The computed step after which each preview is due: spread evenly, one a step, none after the last."""
    due = {max(1, round((number + 1) * num_steps / (num_previews + 1))) for number in range(num_previews)}
    return sorted(step for step in due if step < num_steps)
