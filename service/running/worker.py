"""The loop that turns claimed jobs into pictures and meshes: start, step, publish. One thread owns the steps."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

from models.card import ModelCard
from models.request import GenerationRequest
from service.jobs.job import Job, Priority
from service.jobs.store import Claim, Ending, Progress
from service.metrics import Metrics
from service.running.publisher import Denoised, Publisher, Report, Sketched
from service.scheduling.batching import Candidate, Turns, form_groups, shape_of
from service.scheduling.cost import BlockSeconds, block_seconds, dense_step_seconds
from service.scheduling.deadline import point_for

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine
    from models.state import DenoiseState

logger = logging.getLogger(__name__)

_WEIGHTS = {Priority.LOW: 0.5, Priority.NORMAL: 1.0, Priority.HIGH: 2.0}


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """`max_batch_size` results share a step, `max_running` are in memory."""

    max_batch_size: int
    max_running: int


@dataclass(slots=True, eq=False)
class _Held:
    """A claimed job. `unstarted` are the numbers of its pictures that wait for room."""

    claim: Claim
    shape: str
    unstarted: list[int]
    began: float = field(default_factory=time.perf_counter)
    steps_done: int = 0

    def request(self, index: int) -> GenerationRequest:
        return self.claim.job.requests[index]


@dataclass(slots=True, eq=False)
class _Running:
    """A picture between its start and its last step. `denoise_began` is of the performance counter.

    `service` is the weighted time that it has had of the device; see `scheduling.batching`.
    """

    held: _Held
    index: int
    state: "DenoiseState"
    queue_s: float
    encode_s: float
    denoise_began: float
    service: float
    block_seconds: BlockSeconds
    num_companions: int = 0  # the sum of batch sizes over its steps, itself included
    pace: float = 1.0  # how much longer than predicted its last step took, others' turns included
    last_step_ended: float | None = None

    @property
    def job(self) -> Job:
        return self.held.claim.job

    def as_candidate(self) -> Candidate:
        return Candidate(self.state.batch_key, self.service, self.state.expected_runs, self.block_seconds)


class Worker:
    """Makes the jobs that it is given, in a thread of its own, from `start` to `stop`.

    What becomes of them it tells by `report`, called from any thread; `on_room` is called when it could take more.
    """

    def __init__(
        self,
        load_engine: Callable[[], "Engine"],
        metrics: Metrics,
        limits: WorkerLimits,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = limits
        self.cards: Mapping[str, ModelCard] = {}
        self.report: Callable[[Report], None] = lambda report: None
        self.on_room: Callable[[], None] = lambda: None
        self._metrics = metrics
        self._load_engine = load_engine
        self._clock = clock
        self._publisher = Publisher(metrics, self._tell, self.is_held, clock=clock)
        self._loaded: Future[None] = Future()
        self._thread = Thread(target=self._run, name="worker", daemon=True)
        self._wake = Event()
        self._is_stopping = False
        self._lock = Lock()  # over what several threads look at: the jobs that are held, and what runs
        self._held: dict[str, _Held] = {}
        self._running: list[_Running] = []
        self._turns = Turns()

    def start(self) -> None:
        """Load the engine and begin. Raises what loading raises."""
        self._thread.start()
        self._loaded.result()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, timeout_s: float) -> bool:
        """Take no further step, and wait for the one that is running; whether it ended in time."""
        self._is_stopping = True
        self._wake.set()
        if self.is_alive:
            self._thread.join(timeout_s)
        return not self.is_alive

    def can_take(self, model: str, shape: str) -> bool:
        """Whether a picture of this shape could start now, with none of the same shape before it."""
        with self._lock:
            waiting = [held.shape for held in self._held.values() for _ in held.unstarted]
            return model in self.cards and self._has_room(model, shape, waiting)

    def take(self, claim: Claim) -> None:
        """Make this job, which was claimed because it could be taken."""
        job = claim.job
        with self._lock:
            self._held[job.id] = _Held(claim, shape_of(job.requests[0]), list(range(len(job.requests))))
        self._wake.set()

    def drop(self, job_id: str) -> None:
        """Let go of a job before its next step; one that is not held changes nothing."""
        with self._lock:
            self._held.pop(job_id, None)
        self._wake.set()

    def held(self) -> list[Claim]:
        """The jobs that it has taken and that have not ended."""
        with self._lock:
            return [held.claim for held in self._held.values()]

    def finish_seconds(self, model: str) -> float:
        """What came after the steps of the model's last result."""
        return self._publisher.finish_seconds(model)

    def is_held(self, claim: Claim) -> bool:
        """Whether anybody still wants this job from this worker."""
        with self._lock:
            held = self._held.get(claim.job.id)
        return held is not None and held.claim is claim

    def _run(self) -> None:
        try:
            engine = self._load_engine()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self.cards = engine.cards
        self._loaded.set_result(None)
        try:
            while not self._is_stopping:
                self._take_turn(engine)
        except Exception:
            logger.exception("the worker stopped")
        finally:
            self._publisher.close()
            self.on_room()

    def _take_turn(self, engine: "Engine") -> None:
        self._wake.clear()  # before looking, so that what arrives while we look wakes us again
        self._drop_unwanted()
        self._start_what_fits(engine)
        if self._running:
            self._step(engine, self._next_batch())
            self._publish_done(engine)
        else:
            self._metrics.observe_groups(self.cards, [])
            self._wake.wait()

    def _drop_unwanted(self) -> None:
        """Let go of pictures whose job was cancelled or has failed, and with them of their memory."""
        kept = [running for running in self._running if self.is_held(running.held.claim)]
        if len(kept) < len(self._running):
            with self._lock:
                self._running = kept
            self.on_room()
        self._publisher.drop_unwanted()

    def _start_what_fits(self, engine: "Engine") -> None:
        with self._lock:
            waiting = [(held, index) for held in self._held.values() for index in held.unstarted]
        for held, index in waiting:
            with self._lock:
                has_room = self._has_room(held.claim.job.model, held.shape, [])
                if has_room and index in held.unstarted:
                    held.unstarted.remove(index)
            if has_room:
                self._start(engine, held, index)

    def _has_room(self, model: str, shape: str, waiting: Sequence[str]) -> bool:
        """Whether one more could start, those of the shapes `waiting` being started already. Under the lock."""
        shapes = [*waiting, *(running.held.shape for running in self._running)]
        is_full = len(shapes) + self._publisher.num_unfinished >= self.limits.max_running
        return not is_full and shapes.count(shape) < self._max_batch_size(model)

    def _max_batch_size(self, model: str) -> int:
        return min(self.limits.max_batch_size, self.cards[model].max_batch_size)

    def _start(self, engine: "Engine", held: _Held, index: int) -> None:
        job = held.claim.job
        if not self.is_held(held.claim):  # an earlier picture of the same job has failed
            return
        queue_s = self._clock() - job.created_at
        began = time.perf_counter()
        try:
            state = engine.start(held.request(index))
        except Exception as error:
            self._publisher.fail(held.claim, error)
            return
        now = time.perf_counter()
        self._metrics.observe_stage(job.model, "encode", now - began)
        cost = block_seconds(held.request(index), self.cards[job.model])
        running = _Running(held, index, state, queue_s, now - began, now, self._turns.at_start, cost)
        with self._lock:
            self._running.append(running)

    def _next_batch(self) -> list[_Running]:
        groups = form_groups([running.as_candidate() for running in self._running])
        self._metrics.observe_groups(self.cards, [self._running[group[0]].job.model for group in groups])
        batch = [self._running[index] for index in groups[0]]
        return batch[: self._max_batch_size(batch[0].job.model)]

    def _step(self, engine: "Engine", batch: Sequence[_Running]) -> None:
        """One denoise step of `batch`. If it fails, each member steps alone, and only those that fail again fail."""
        for running in batch:
            self._keep_deadline(running)
        expected = [running.as_candidate() for running in batch]
        try:
            report = engine.step([running.state for running in batch])
        except Exception as error:
            if len(batch) == 1:
                self._let_go(batch[0])
                self._publisher.fail(batch[0].held.claim, error)
                return
            logger.warning("a step of %d pictures failed; each steps alone now", len(batch), exc_info=error)
            for running in batch:
                self._step(engine, [running])
            return
        self._metrics.observe_step(batch[0].job.model, report)
        self._metrics.observe_memory(engine.memory_bytes())
        now = time.perf_counter()
        services = self._turns.after_step(expected, [_weight(running.job) for running in batch], report.seconds)
        for running, service in zip(batch, services, strict=True):
            self._measure_pace(running, now)
            running.service = service
            running.num_companions += report.batch_size
            running.held.steps_done += 1
        for held in dict.fromkeys(running.held for running in batch):
            self._tell(self._progress(held))
        for running in batch:
            self._preview_if_due(engine, running)

    def _keep_deadline(self, running: _Running) -> None:
        """Under a deadline, choose the coming step's place on the curve from the time that is left."""
        job, state = running.job, running.state
        if job.deadline_at is None:
            return
        point = point_for(
            running.held.request(running.index),
            self.cards[job.model],
            time_left_s=job.deadline_at - self._clock() - self.finish_seconds(job.model),
            steps_left=state.num_steps - state.step_index,
            pace=running.pace,
        )
        state.move_to(point)

    def _measure_pace(self, running: _Running, now: float) -> None:
        request, card = running.held.request(running.index), self.cards[running.job.model]
        predicted_s = dense_step_seconds(request, card) * running.state.point.relative_seconds
        running.pace = (now - (running.last_step_ended or running.denoise_began)) / predicted_s
        running.last_step_ended = now

    def _progress(self, held: _Held) -> Progress:
        """What a job's pictures have had so far, and how long the rest will take if it goes on like that."""
        states = [running.state for running in self._running if running.held is held]
        elapsed_s = time.perf_counter() - held.began
        num_left = held.claim.job.num_steps - held.steps_done
        return Progress(
            held.claim,
            steps_done=held.steps_done,
            compute_ratio=sum(state.compute_ratio for state in states) / len(states),
            eta_s=elapsed_s / held.steps_done * num_left,
        )

    def _preview_if_due(self, engine: "Engine", running: _Running) -> None:
        """Previews are spread evenly over the steps, none of them after the last one."""
        state, wanted = running.state, running.held.claim.job.num_previews
        for number in range(wanted):
            if state.step_index == max(1, round((number + 1) * state.num_steps / (wanted + 1))) < state.num_steps:
                self._publisher.sketch(Sketched(running.held.claim, running.index, number, engine.preview(state)))

    def _publish_done(self, engine: "Engine") -> None:
        """Hand those that took their last step to the publisher."""
        for running in [running for running in self._running if running.state.is_done]:
            denoised = Denoised(
                claim=running.held.claim,
                index=running.index,
                decode=partial(engine.finish, running.state),
                summary=running.state.summary(),
                queue_s=running.queue_s,
                encode_s=running.encode_s,
                denoise_s=time.perf_counter() - running.denoise_began,
                batch_size_mean=running.num_companions / running.state.num_steps,
            )
            self._publisher.publish(denoised, on_file=self._look_for_room)
            self._let_go(running)

    def _let_go(self, running: _Running) -> None:
        with self._lock:
            self._running.remove(running)
        self.on_room()

    def _look_for_room(self) -> None:
        self._wake.set()
        self.on_room()

    def _tell(self, report: Report) -> None:
        """Report; a job that has ended is held no longer."""
        self.report(report)
        if isinstance(report, Ending):
            self.drop(report.claim.job.id)


def _weight(job: Job) -> float:
    """What a second counts of those that it is given: a deadline makes haste too."""
    return _WEIGHTS[job.priority if job.deadline_at is None else Priority.HIGH]
