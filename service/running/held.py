"""What a worker holds: the jobs that it has taken, and their requests from start to decoded field."""

import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from models.errors import DeviceLost
from models.memory import RequestMemory
from models.mesh.surface import FieldSamples
from models.request import GenerationRequest
from service.jobs.job import Job, Priority
from service.jobs.store import Claim, Progress
from service.scheduling.batching import Candidate
from service.scheduling.cost import BlockSeconds, grid_bytes

if TYPE_CHECKING:  # brings torch, which the API side never loads
    from models.families.family import BranchStart, Encoded
    from models.state import DenoiseState

_WEIGHTS = {Priority.LOW: 0.5, Priority.NORMAL: 1.0, Priority.HIGH: 256.0}
_DEADLINE_WEIGHT = 2.0

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
    `memory` is what each request takes of the device.
    """

    claim: Claim
    shape: str
    memory: RequestMemory
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

    `denoise_began`, `last_step_ended` and `denoise_ended` are times of the performance counter. `virtual_time` is the
    weighted device time that the request has had, see `scheduling.batching.FairShare`. `batch_size_sum` adds up the
    batch sizes of its computed steps. `pace` is how much longer than predicted its last computed step took, including
    the steps of other requests. `num_previews` is how many previews were made.
    """

    held: HeldJob
    index: int
    state: "DenoiseState"
    queue_s: float
    encode_s: float
    denoise_began: float
    virtual_time: float
    block_seconds: BlockSeconds
    batch_size_sum: int = 0
    pace: float = 1.0
    num_previews: int = 0
    last_step_ended: float | None = None
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

    def as_candidate(self) -> Candidate:
        if self.decoding is not None:
            # Its turn is shared with nobody.
            return Candidate(
                self, self.virtual_time, [1.0], BlockSeconds(0.0, DECODE_TURN_S), self.weight, self.job.is_high
            )
        runs = self.state.expected_runs
        return Candidate(
            self.state.batch_key, self.virtual_time, runs, self.block_seconds, self.weight, self.job.is_high
        )


def preview_steps(num_previews: int, num_steps: int) -> list[int]:
    """The computed step after which each preview is due: spread evenly, one a step, none after the last."""
    due = {max(1, round((number + 1) * num_steps / (num_previews + 1))) for number in range(num_previews)}
    return sorted(step for step in due if step < num_steps)
