"""The loop that turns queued jobs into pictures and meshes: claim, start, step, publish. One thread owns the steps."""

import logging
import math
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

from models.card import ModelCard
from models.request import GenerationRequest
from service.errors import Draining
from service.jobs.job import Job, JobStatus, Outcome
from service.jobs.memory import MemoryStore
from service.metrics import Metrics
from service.publisher import Denoised, Publisher
from service.scheduling.batching import Candidate, next_group, shape_of

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine
    from models.state import DenoiseState

logger = logging.getLogger(__name__)

# How long `stop` waits, after the grace, for a denoise step that is still running.
LAST_STEP_S = 5.0


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """`max_batch_size` results share a step, `max_running` are in memory; `grace_s` is for finishing at the end."""

    max_batch_size: int
    max_running: int
    grace_s: float


@dataclass(frozen=True, slots=True)
class _Picture:
    """Number `index` of a claimed job's pictures."""

    job: Job
    index: int

    @property
    def request(self) -> GenerationRequest:
        return self.job.requests[self.index]


@dataclass(slots=True)
class _Running:
    """A picture between its start and its last step. `denoise_began` is of the performance counter."""

    picture: _Picture
    state: "DenoiseState"
    queue_s: float
    encode_s: float
    denoise_began: float
    last_turn: int
    num_companions: int = 0  # the sum of batch sizes over its steps, itself included


class Worker:
    """Makes the jobs of `store` in a thread of its own, from `start` to `stop`."""

    def __init__(
        self,
        load_engine: Callable[[], "Engine"],
        store: MemoryStore,
        metrics: Metrics,
        limits: WorkerLimits,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        self.metrics = metrics
        self.limits = limits
        self.cards: Mapping[str, ModelCard] = {}
        self._load_engine = load_engine
        self._clock = clock
        self._publisher = Publisher(store, metrics, clock=clock)
        self._loaded: Future[None] = Future()
        self._thread = Thread(target=self._run, name="worker", daemon=True)
        self._wake = Event()
        self._door = Lock()  # so that no job comes in after the last look at the queue
        self._grace_ends: float | None = None
        # What follows belongs to the worker's thread.
        self._turn = 0
        self._unstarted: list[_Picture] = []
        self._running: list[_Running] = []

    def start(self) -> None:
        """Load the engine and begin. Raises what loading raises."""
        self._thread.start()
        self._loaded.result()

    def submit(self, job: Job) -> Future[Outcome]:
        """Queue a job; the future is done when it has ended. Raises Draining."""
        with self._door:
            self.check_accepting()
            outcome = self.store.add(job)
        self._wake.set()
        return outcome

    def cancel(self, job_id: str) -> None:
        """A queued job never runs, a running one leaves before its next step; one that has ended stays as it is."""
        self._publisher.end(job_id, JobStatus.CANCELLED)
        self._wake.set()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def check_accepting(self) -> None:
        """Raise Draining once the server is shutting down."""
        if self._grace_ends is not None:
            raise Draining("the server is shutting down", math.ceil(self.limits.grace_s))

    def stop_accepting(self) -> None:
        """Finish what was accepted, for `grace_s` at most; then `is_alive` is false. Further calls change nothing."""
        with self._door:
            if self._grace_ends is None:
                self._grace_ends = time.monotonic() + self.limits.grace_s
        self._wake.set()

    def stop(self) -> None:
        """Stop accepting, and return when the thread has ended."""
        self.stop_accepting()
        if self._grace_ends is not None and self.is_alive:
            self._thread.join(max(0.0, self._grace_ends - time.monotonic()) + LAST_STEP_S)
        if self.is_alive:
            logger.warning("the worker is still in a step after the grace of %g s; its jobs fail", self.limits.grace_s)
            self._publisher.fail_everything_left()

    def _run(self) -> None:
        try:
            engine = self._load_engine()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self.cards = engine.cards
        self._loaded.set_result(None)
        try:
            while self._take_turn(engine):
                self._turn += 1
        except Exception:
            logger.exception("the worker stopped")
        finally:
            self.stop_accepting()
            self._publisher.close()
            self._publisher.fail_everything_left()

    def _take_turn(self, engine: "Engine") -> bool:
        """One round of the loop; False when draining is over."""
        self._wake.clear()  # before looking, so that what arrives while we look wakes us again
        is_draining = self._grace_ends is not None
        if self._grace_ends is not None and time.monotonic() > self._grace_ends:
            self._publisher.fail_everything_left()
        self._drop_ended()
        self._start_what_fits(engine)
        if self._running:
            self._step(engine, self._next_batch())
            self._publish_done(engine)
        elif not is_draining:
            self._wake.wait()
        elif self._publisher.num_unfinished and self._grace_left() > 0:
            self._wake.wait(self._grace_left())  # while they take up the room, some may still be in the queue
        else:
            return False
        return True

    def _grace_left(self) -> float:
        return 0.0 if self._grace_ends is None else self._grace_ends - time.monotonic()

    def _drop_ended(self) -> None:
        """Let go of pictures whose job was cancelled or has failed, and with them of their memory."""
        self._unstarted = [picture for picture in self._unstarted if self.store.is_live(picture.job.id)]
        self._running = [running for running in self._running if self.store.is_live(running.picture.job.id)]
        self._publisher.drop_ended()

    def _start_what_fits(self, engine: "Engine") -> None:
        """Start pictures of claimed jobs, then claim more jobs, while there is room."""
        self._start_unstarted(engine)
        while job := self.store.claim(self._can_claim):
            self._unstarted += [_Picture(job, index) for index in range(len(job.requests))]
            self._start_unstarted(engine)

    def _start_unstarted(self, engine: "Engine") -> None:
        for picture in list(self._unstarted):
            if self._has_room(picture.request):
                self._unstarted.remove(picture)
                self._start(engine, picture)

    def _can_claim(self, job: Job) -> bool:
        """Whether a picture of `job` could start now, with none of the same shape before it."""
        shape = shape_of(job.requests[0])
        return self._has_room(job.requests[0]) and all(
            shape_of(picture.request) != shape for picture in self._unstarted
        )

    def _has_room(self, request: GenerationRequest) -> bool:
        shapes: list[Hashable] = [shape_of(running.picture.request) for running in self._running]
        is_full = len(shapes) + self._publisher.num_unfinished >= self.limits.max_running
        return not is_full and shapes.count(shape_of(request)) < self._max_batch_size(request.model)

    def _max_batch_size(self, model: str) -> int:
        return min(self.limits.max_batch_size, self.cards[model].max_batch_size)

    def _start(self, engine: "Engine", picture: _Picture) -> None:
        if not self.store.is_live(picture.job.id):  # an earlier picture of the same job has failed
            return
        queue_s = self._clock() - picture.job.created_at
        began = time.perf_counter()
        try:
            state = engine.start(picture.request)
        except Exception as error:
            self._publisher.fail(picture.job, error)
            return
        now = time.perf_counter()
        self.metrics.observe_stage(picture.job.model, "encode", now - began)
        self._running.append(_Running(picture, state, queue_s, now - began, denoise_began=now, last_turn=self._turn))

    def _next_batch(self) -> list[_Running]:
        candidates = [Candidate(running.state.batch_key, running.last_turn) for running in self._running]
        group = [self._running[index] for index in next_group(candidates)]
        return group[: self._max_batch_size(group[0].picture.job.model)]

    def _step(self, engine: "Engine", batch: Sequence[_Running]) -> None:
        """One denoise step of `batch`. If it fails, each member steps alone, and only those that fail again fail."""
        try:
            report = engine.step([running.state for running in batch])
        except Exception as error:
            if len(batch) == 1:
                self._running.remove(batch[0])
                self._publisher.fail(batch[0].picture.job, error)
                return
            logger.warning("a step of %d pictures failed; each steps alone now", len(batch), exc_info=error)
            for running in batch:
                self._step(engine, [running])
            return
        self.metrics.observe_step(batch[0].picture.job.model, report)
        for running in batch:
            running.last_turn = self._turn
            running.num_companions += report.batch_size
            self.store.record_step(running.picture.job.id)

    def _publish_done(self, engine: "Engine") -> None:
        """Hand those that took their last step to the publisher."""
        for running in [running for running in self._running if running.state.is_done]:
            self._running.remove(running)
            self._publisher.publish(
                Denoised(
                    job=running.picture.job,
                    index=running.picture.index,
                    decode=partial(engine.finish, running.state),
                    summary=running.state.summary(),
                    queue_s=running.queue_s,
                    encode_s=running.encode_s,
                    denoise_s=time.perf_counter() - running.denoise_began,
                    batch_size_mean=running.num_companions / running.state.num_steps,
                ),
                on_file=self._wake.set,
            )
