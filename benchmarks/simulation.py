"""How does the service's scheduling do under any load? A simulation with a clock of its own, without torch.

`Server.serve` says what becomes of each call; tests and experiments ask it. The service's own code decides: admission,
the order of the queue, places, turns, shared steps, points for deadlines. Only the device is simulated. Its steps take
what the model's card predicts, times a random factor, and encoding, steps and decoding take turns on it.
"""

import heapq
from bisect import insort
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random
from types import SimpleNamespace
from typing import Any, cast

from models.budget import resolve
from models.card import Guidance, ImageCard, SizeLimits
from models.curve import EXACT, ComputedSteps, CurvePoint, Preset
from models.memory import ImageMemory, Values
from models.request import Budget, ImageRequest
from models.rules.dense import DensePolicy
from service.errors import DeadlineUnreachable, Overloaded
from service.jobs.job import Job, Priority
from service.jobs.store import Claim, JobKind
from service.order import Order, Output
from service.running.held import HeldJob, Running
from service.running.publisher import Publisher
from service.running.room import Room, WorkerLimits
from service.scheduling.admission import Backlog, Promises, admit
from service.scheduling.batching import Candidate, FairShare, shape_of
from service.scheduling.cost import block_seconds, order_seconds
from service.scheduling.deadline import point_for, seconds_for_steps, slack_s
from service.scheduling.memory import Decoding
from service.scheduling.pace import Pace, Peak
from service.scheduling.precedence import Precedence
from service.scheduling.queueing import due_at

CARD = ImageCard(
    id="simulated",
    family="simulated",
    license="apache-2.0",
    created=0,
    default_height=64,
    default_width=64,
    decode_seconds=0.05,
    default_num_inference_steps=20,
    default_guidance_scale=3.0,
    sizes=SizeLimits(multiple_of=16, minimum=32, maximum=128),
    max_prompt_characters=100,
    max_num_inference_steps=50,
    guidance=Guidance.DISTILLED,
    rules=("forecast", "dense"),
    quality_metric="ssim",
    curve=(
        EXACT,
        CurvePoint(DensePolicy(), 0.4, 0.4, 0.97, 0.98, Preset.HIGH, ComputedSteps(8, 20)),
        CurvePoint(DensePolicy(), 0.25, 0.25, 0.93, 0.95, Preset.BALANCED, ComputedSteps(5, 20)),
        CurvePoint(DensePolicy(), 0.2, 0.2, 0.9, 0.95, Preset.FAST, ComputedSteps(4, 20)),
        CurvePoint(DensePolicy(), 0.15, 0.15, 0.8, 0.9, Preset.DRAFT, ComputedSteps(3, 20)),
    ),
    blocks=("double.00", "single.00"),
    dense_step_seconds=0.07,
    fixed_share=0.7,
    encode_seconds=0.02,
    max_batch_size=8,
    memory=ImageMemory(
        weights=0,
        num_blocks=2,
        token_bytes=1,
        latent_bytes=1,
        step_values=(Values(1.0, 1.0),),
        pixels_per_token=16,
        max_text_tokens=16,
        pads_prompts=True,
        encode_token_bytes=1,
        encode_pixel_bytes=1,
        decode_pixel_bytes=1,
    ),
)
"""About tiny-flux at 128x128 on one core."""


_LIMITS = WorkerLimits(max_batch_size=8, max_running=16, max_decode_bytes=1)


@dataclass(slots=True)
class State:
    """What scheduling sees of a `models.state.DenoiseState`."""

    request: ImageRequest
    point: CurvePoint
    num_blocks: int
    step_index: int = 0
    computed: int = 0

    @property
    def batch_key(self) -> Hashable:
        size = (self.request.width, self.request.height)
        return (size, id(self)) if self.request.wants_exact else size

    @property
    def expected_runs(self) -> list[float]:
        return [float(self.request.num_branches)] * self.num_blocks

    @property
    def num_steps(self) -> int:
        return self.request.num_steps

    @property
    def num_computed_steps(self) -> int:
        left = max(self.point.num_computed_steps(self.num_steps) - self.computed, 1)
        return self.computed + min(left, self.num_steps - self.step_index)

    @property
    def is_done(self) -> bool:
        return self.step_index == self.num_steps

    def step(self) -> None:
        left = self.num_computed_steps - self.computed
        self.step_index += (self.num_steps - self.step_index) // left
        self.computed += 1


@dataclass(frozen=True, slots=True)
class Arrival:
    """A call at a time in seconds. Without an `owner` the server has no keys."""

    at: float
    request: ImageRequest
    owner: str | None = None
    weight: float = 1.0
    priority: Priority = Priority.NORMAL


@dataclass(slots=True)
class Outcome:
    """What became of a call. Times are in seconds; `retry_after_s` is what its last refusal said, if there was one."""

    arrival: Arrival
    job: Job | None = None
    ended_at: float | None = None
    num_refusals: int = 0
    retry_after_s: int | None = None
    is_unreachable: bool = False

    @property
    def seconds(self) -> float:
        """From its admission to its end."""
        assert self.job is not None
        assert self.ended_at is not None
        return self.ended_at - self.job.created_at

    @property
    def is_in_time(self) -> bool:
        assert self.job is not None
        assert self.job.deadline_at is not None
        assert self.ended_at is not None
        return self.ended_at <= self.job.deadline_at


@dataclass(slots=True)
class Server:
    """One worker and its queue. `takes_turns` is the other scheduler: see `benchmarks.scheduling`."""

    card: ImageCard = CARD
    max_backlog_s: float = 120.0
    takes_turns: bool = False
    num_retries: int = 0
    draws: Random = field(default_factory=lambda: Random(0))
    now: float = 0.0
    busy_s: float = 0.0
    _queue: list[tuple[float, int, Job]] = field(default_factory=list)
    _running: list[Running] = field(default_factory=list)
    _left_s: dict[str, float] = field(default_factory=dict)  # of each live job
    _own_s: defaultdict[str | None, float] = field(default_factory=lambda: defaultdict(float))
    _outcomes: dict[str, Outcome] = field(default_factory=dict)
    _numbers: Any = field(default_factory=count)
    _pace: Pace = field(default_factory=Pace)
    _fair_share: FairShare = field(default_factory=FairShare)
    _precedence: Precedence = field(default_factory=Precedence)
    _promises: Promises = field(default_factory=Promises)
    _finish_s: float = 0.0
    _longest_step: Peak = field(default_factory=lambda: Peak(0.02))
    _total_s: float = 0.0
    _urgent_s: float = 0.0

    def serve(self, arrivals: Iterable[Arrival]) -> list[Outcome]:
        """What becomes of each call. Refused ones are repeated when their answer said, at most `num_retries` times."""
        publisher = SimpleNamespace(num_unfinished=0, decoding=Decoding())
        room = Room(_LIMITS, cast(Publisher, publisher))
        room.cards = {self.card.id: self.card}
        outcomes = [Outcome(arrival) for arrival in arrivals]
        calls = [(outcome.arrival.at, number, outcome) for number, outcome in enumerate(outcomes)]
        heapq.heapify(calls)
        while calls or self._queue or self._running:
            if not self._queue and not self._running:
                self.now = max(self.now, calls[0][0])
            while calls and calls[0][0] <= self.now:
                at, _, outcome = heapq.heappop(calls)
                self._admit(outcome, at)
                if outcome.job is None and outcome.retry_after_s and outcome.num_refusals <= self.num_retries:
                    heapq.heappush(calls, (at + outcome.retry_after_s, next(self._numbers) + len(outcomes), outcome))
            self._start(room)
            if self._running:
                self._step()
        return outcomes

    def _admit(self, outcome: Outcome, at: float) -> None:
        arrival, pace = outcome.arrival, self._pace.ratio
        backlog = Backlog(
            seconds=self._total_s * pace,
            max_seconds=self.max_backlog_s,
            urgent_seconds=self._urgent_s * max(1.0, pace)
            + 2 * max(self._longest_step.seconds, self.card.dense_step_seconds),
            finish_s=self._finish_s,
            pace=pace,
            promised_s=self._promises.seconds(at),
            own_s=self._own_s[arrival.owner] * pace,
            weight=None if arrival.owner is None else arrival.weight,
            num_keys=sum(own_s > 1e-6 for own_s in self._own_s.values()) + (self._own_s[arrival.owner] <= 1e-6),
        )
        try:
            admission = admit(Order((arrival.request,), Output(), None, None), self.card, backlog)
        except Overloaded as error:
            outcome.num_refusals += 1
            outcome.retry_after_s = error.retry_after_s
            cost_s = order_seconds((arrival.request,), self.card) * pace
            self._promises.add(at + error.retry_after_s, cost_s)
            return
        except DeadlineUnreachable:
            outcome.is_unreachable = True
            return
        seconds, deadline_at = admission.predicted_seconds, None
        if admission.latency_s is not None:
            deadline_at = at + admission.latency_s
        number = next(self._numbers)
        own_s = 0.0 if arrival.owner is None else backlog.own_s
        job = Job(
            id=str(number),
            model=self.card.id,
            requests=admission.order.requests,
            output=Output(),
            priority=arrival.priority,
            quality_requested=None,
            predicted_seconds=seconds,
            request_id="",
            created_at=at,
            owner=arrival.owner,
            deadline_at=deadline_at,
            due_at=at
            if self.takes_turns
            else due_at(
                at,
                seconds * pace,
                deadline_at=deadline_at,
                own_s=own_s,
                weight=arrival.weight,
                num_keys=backlog.num_keys,
            ),
        )
        outcome.job, outcome.retry_after_s = job, None
        self._outcomes[job.id] = outcome
        self._note_left(job, seconds)
        insort(self._queue, (job.place, number, job))

    def _note_left(self, job: Job, seconds: float) -> None:
        """Keep the sums that a store keeps."""
        change = seconds - self._left_s.pop(job.id, 0.0)
        self._own_s[job.owner] += change
        self._total_s += change
        self._urgent_s += change * job.is_urgent
        if seconds:
            self._left_s[job.id] = seconds

    def _start(self, room: Room) -> None:
        """Claim what there is room for, and encode it."""
        full: set[JobKind] = set()
        for entry in [*self._queue]:
            job = entry[2]
            kind = JobKind(job.model, self._shape_of(job), job.is_urgent, job.memory)
            if kind in full:
                continue
            if not room.has_place(kind, [], self._running):
                full.add(kind)
                if len(full) == 6:
                    return
                continue
            self._queue.remove(entry)
            if not self._running:
                self._pace.begin(self.now)
            self._run_device(self.card.encode_seconds)
            request = cast(ImageRequest, job.requests[0])
            state = State(request, request.point, len(self.card.blocks))
            held = HeldJob(Claim(job, ""), kind, [], [request.num_computed_steps], began=self.now)
            running = Running(held, 0, cast(Any, state), 0.0, 0.0, self.now, block_seconds(request, self.card))
            running.join(self._fair_share)
            if self.takes_turns:
                running.turn = self.now
            self._running.append(running)

    def _shape_of(self, job: Job) -> str:
        if self.takes_turns:  # light requests have no places of their own, and exact ones as many as others
            return "exact" if job.requests[0].wants_exact else "shared"
        return shape_of(job.requests[0])

    def _run_device(self, seconds: float) -> float:
        seconds *= self.draws.lognormvariate(0.0, 0.1)
        self.now += seconds
        self.busy_s += seconds
        return seconds

    def _step(self) -> None:
        for running in self._running:
            if running.job.deadline_at is not None:
                running.slack_s = slack_s(running.request, self.card, pace=1.0, **self._left(running))
        candidates = [running.as_candidate() for running in self._running]
        group = self._turn_taking(candidates) if self.takes_turns else self._precedence.groups(candidates, self.now)[0]
        group = group[: _LIMITS.max_batch_size]
        members, batch = [candidates[index] for index in group], [self._running[index] for index in group]
        for running in batch:
            self._keep_deadline(running)
        rows = sum(member.expected_runs[0] for member in members)
        call, row = members[0].block_seconds
        began = self.now
        seconds = self._run_device(len(self.card.blocks) * (call + rows * row))
        self._precedence.spend(members[0].is_high, seconds, has_deadline=batch[0].job.deadline_at is not None)
        self._longest_step.observe(seconds)
        for running, member in zip(batch, members, strict=True):
            cast(State, running.state).step()
            running.measure_pace(self.card, began, self.now)
            running.spend(self._fair_share, member.step_seconds)
            if self.takes_turns:
                running.turn = self.now
        for running in batch:
            job, state = running.job, cast(State, running.state)
            if state.is_done:
                self._finish_s = self._run_device(self.card.decode_seconds)
                self._running.remove(running)
                running.spend(self._fair_share, running.left_s)
                self._outcomes[job.id].ended_at = self.now
                self._note_left(job, 0.0)
                self._pace.advance(job.predicted_seconds, self.now)
            else:
                self._note_left(job, job.seconds_left(state.computed, state.num_computed_steps))

    def _turn_taking(self, candidates: Sequence[Candidate]) -> list[int]:
        waited = sorted(range(len(candidates)), key=lambda index: candidates[index].turn)
        return [index for index in waited if candidates[index].batch_key == candidates[waited[0]].batch_key]

    def _keep_deadline(self, running: Running) -> None:
        if running.job.deadline_at is not None:
            state = cast(State, running.state)
            state.point = point_for(
                running.request, self.card, pace=running.pace, best=self._best(running), **self._left(running)
            )

    def _best(self, running: Running) -> float:
        others = any(other.job.deadline_at is not None for other in self._running if other.held is not running.held)
        return running.request.point.quality if others else 1.0

    def _left(self, running: Running) -> dict[str, Any]:
        job, state = running.job, cast(State, running.state)
        assert job.deadline_at is not None
        return {
            "time_left_s": seconds_for_steps(
                running.request, self.card, left_s=job.deadline_at - self.now, finish_s=self._finish_s
            ),
            "steps_left": state.num_steps - state.step_index,
            "num_computed": state.computed,
        }


def request_of(budget: Budget, *, side: int = 64, card: ImageCard = CARD) -> ImageRequest:
    silent = ImageRequest(
        model=card.id,
        prompt="",
        height=side,
        width=side,
        num_inference_steps=card.default_num_inference_steps,
        guidance_scale=card.default_guidance_scale,
        seed=0,
        budget=budget,
        point=EXACT,
        is_guided=False,
    )
    return replace(silent, point=resolve(budget, card.curve_for(silent)))


def poisson(
    requests: Sequence[ImageRequest], per_second: float, seconds: float, seed: int, **fields: Any
) -> list[Arrival]:
    """Calls that come at random, each for one of `requests`."""
    draw, at, arrivals = Random(seed), 0.0, []
    while (at := at + draw.expovariate(per_second)) < seconds:
        arrivals.append(Arrival(at, draw.choice(requests), **fields))
    return arrivals


def capacity(requests: Sequence[ImageRequest], card: ImageCard = CARD, num_calls: int = 300) -> float:
    """Requests a second that a server which always has work serves."""
    arrivals = [Arrival(0.0, request) for request in Random(1).choices(requests, k=num_calls)]
    server = Server(card, max_backlog_s=1e9)
    server.serve(arrivals)
    return num_calls / server.now
