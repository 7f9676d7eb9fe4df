"""The loop that runs claimed jobs: start, step, decode a mesh's field, publish. One thread has the device."""

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

from models.card import ModelCard
from models.mesh.surface import FieldSamples
from models.report import StepReport
from service.jobs.job import JobStatus
from service.jobs.store import Claim, Ending
from service.metrics import Metrics
from service.running.held import DECODE_TURN_S, HeldJob, Running, preview_steps
from service.running.publisher import Decoded, Denoised, PendingPreview, Publisher, Report
from service.running.starting import Starter
from service.scheduling.batching import Candidate, FairShare, shape_of
from service.scheduling.cost import dense_step_seconds, grid_bytes
from service.scheduling.deadline import point_for
from service.scheduling.pace import Pace
from service.scheduling.precedence import Precedence

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine

logger = logging.getLogger(__name__)

_SHARE_FOR_HIGH = 8
"""One in so many of the places for running requests is kept for those of high priority."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """At most `max_batch_size` requests share a step, and at most `max_running` are in memory.

    The grids of meshes that are decoded at once take at most `max_decode_bytes`, as predicted. A larger one goes alone.
    """

    max_batch_size: int
    max_running: int
    max_decode_bytes: int


class Worker:
    """Runs the jobs that it takes, in a thread of its own, from `start` to `stop`.

    It reports progress, previews and ends to `report`, and calls `on_room` when it could take more. Both may be called
    from any thread.
    """

    def __init__(
        self,
        load_engine: Callable[[], "Engine"],
        metrics: Metrics,
        limits: WorkerLimits,
        *,
        report: Callable[[Report], None],
        on_room: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = limits
        self.cards: Mapping[str, ModelCard] = {}
        self.is_broken = False
        """Whether the thread has ended because of an error."""
        self.pace = Pace()
        self._report = report
        self._on_room = on_room
        self._metrics = metrics
        self._load_engine = load_engine
        self._engine: Engine | None = None
        self._clock = clock
        self._wake = Event()
        self._publisher = Publisher(metrics, self._tell, self.is_held, clock=clock)
        self._loaded: Future[None] = Future()
        self._thread = Thread(target=self._run, name="worker", daemon=True)
        self._is_stopping = False
        self._lock = Lock()  # protects the attributes that several threads use: `_held` and `_running`
        self._held: dict[str, HeldJob] = {}
        self._running: list[Running] = []
        self._fair_share = FairShare()
        self._precedence = Precedence()
        self._starter = Starter(
            metrics,
            self._publisher,
            self._fair_share,
            self._precedence,
            classes=self._classes,
            claim_place=self._claim_place,
            add=self._add,
            is_held=self.is_held,
            on_ready=self._wake.set,
            clock=clock,
        )

    def start(self) -> None:
        """Load the engine and start the thread. Raises the errors of loading."""
        self._thread.start()
        self._loaded.result()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, timeout_s: float) -> bool:
        """Start no further step and wait for the one that is running. Returns whether it ended in time."""
        self._is_stopping = True
        self._wake.set()
        if self.is_alive:
            self._thread.join(timeout_s)
        return not self.is_alive

    def can_take(self, model: str, shape: str, is_high: bool) -> bool:
        """Whether a request of this shape, perhaps of high priority, could start before any that waits here."""
        with self._lock:
            waiting = [held for held in self._held.values() for _ in held.unstarted]
            return model in self.cards and self._has_room(model, shape, is_high, waiting)

    def take(self, claim: Claim) -> None:
        """Run this job, which was claimed because `can_take` allowed it."""
        job = claim.job
        held = HeldJob(
            claim,
            shape_of(job.requests[0]),
            unstarted=list(range(len(job.requests))),
            num_steps=[request.num_computed_steps for request in job.requests],
        )
        with self._lock:
            if not self._held:
                self.pace.begin(held.began)
            self._held[job.id] = held
        if self._engine is not None:
            self._starter.begin(self._engine, held)
        self._wake.set()

    def drop(self, job_id: str, *, is_finished: bool = False) -> None:
        """Let go of a job: stop it before its next step, or note that it is finished. It need not be held."""
        with self._lock:
            held = self._held.pop(job_id, None)
        if held is not None:
            left_s = 0.0 if is_finished else held.job.seconds_left(held.steps_done, sum(held.num_steps))
            self.pace.advance(held.job.predicted_seconds - left_s, time.perf_counter())
        self._wake.set()

    def held(self) -> list[Claim]:
        """The jobs that it has taken and not ended."""
        with self._lock:
            return [held.claim for held in self._held.values()]

    def finish_seconds(self, model: str) -> float:
        """How long decoding and encoding the model's last result took; 0 before the first."""
        return self._publisher.finish_seconds(model)

    def is_held(self, claim: Claim) -> bool:
        """Whether this worker still runs the job under this claim."""
        with self._lock:
            held = self._held.get(claim.job.id)
        return held is not None and held.claim is claim

    def _run(self) -> None:
        try:
            engine = self._load_engine()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._engine = engine
        self.cards = engine.cards
        self._loaded.set_result(None)
        try:
            while not self._is_stopping:
                self._take_turn(engine)
        except Exception:
            logger.exception("the worker stopped")
            self.is_broken = True
        finally:
            self._starter.close()
            self._publisher.close()
            self._on_room()

    def _take_turn(self, engine: "Engine") -> None:
        self._wake.clear()  # first, so that anything that arrives from here on wakes the loop again
        self._drop_unwanted()
        self._decode_done(engine)
        with self._lock:
            jobs = list(self._held.values())
        self._starter.start_what_fits(engine, jobs)
        if self._running:
            batch = self._next_batch()
            if batch[0].decoding is None:
                self._step(engine, batch)
            else:
                self._decode(batch[0], batch[0].decoding)
        else:
            self._metrics.observe_groups(self.cards, [])
            self._wake.wait()

    def _drop_unwanted(self) -> None:
        """Free the memory of requests whose job was cancelled or has failed."""
        kept = [running for running in self._running if self.is_held(running.claim)]
        if len(kept) < len(self._running):
            with self._lock:
                self._running = kept
            self._on_room()
        self._publisher.drop_unwanted()

    def _claim_place(self, held: HeldJob, index: int) -> bool:
        """Whether a request can start now. It then no longer waits."""
        with self._lock:
            has_room = self._has_room(held.job.model, held.shape, held.job.is_high, [])
            if has_room and index in held.unstarted:
                held.unstarted.remove(index)
            return has_room

    def _add(self, running: Running) -> None:
        with self._lock:
            self._running.append(running)

    def _has_room(self, model: str, shape: str, is_high: bool, waiting: Sequence[HeldJob]) -> bool:
        """Whether one more request could start if one of each of `waiting` had started. Needs the lock.

        One of high priority does not wait for others to end: they leave room for it, and it does not count them among
        those of its shape.
        """
        most = self.limits.max_running
        held = [*waiting, *(running.held for running in self._running)]
        is_full = len(held) + self._publisher.num_unfinished >= (most if is_high else most - most // _SHARE_FOR_HIGH)
        rivals = sum(other.shape == shape and (other.job.is_high or not is_high) for other in held)
        return not is_full and rivals < self._max_batch_size(model)

    def _max_batch_size(self, model: str) -> int:
        return min(self.limits.max_batch_size, self.cards[model].max_batch_size)

    def _classes(self) -> set[bool]:
        """Whether those that can have a turn, and those that start before others, are of high priority."""
        with self._lock:
            starting = {True for held in self._held.values() if held.unstarted and held.job.is_high}
        return starting | {running.job.is_high for running in self._ready()}

    def _ready(self) -> list[Running]:
        """Those that can have a turn: all but those that wait until there is room for their grid."""
        return [running for running in self._running if running.decoding is not None or not running.state.is_done]

    def _next_batch(self) -> list[Running]:
        """The requests that share the next step, or the one whose decoding has a turn."""
        ready = self._ready()
        groups = self._precedence.groups([running.as_candidate() for running in ready], time.perf_counter())
        self._metrics.observe_groups(self.cards, [ready[group[0]].job.model for group in groups])
        batch = [ready[index] for index in groups[0]]
        return batch[: self._max_batch_size(batch[0].job.model)]

    def _step(self, engine: "Engine", batch: Sequence[Running]) -> None:
        """Run one computed step of `batch`. If it fails, repeat it for each request alone: only the culprits fail."""
        for running in batch:
            self._keep_deadline(running)
        expected = [running.as_candidate() for running in batch]
        try:
            report = engine.step([running.state for running in batch])
        except Exception as error:
            if len(batch) == 1:
                self._let_go(batch[0])
                self._publisher.fail(batch[0].claim, error)
                return
            logger.warning("a step of %d requests failed; each steps alone now", len(batch), exc_info=error)
            for running in batch:
                self._step(engine, [running])
            return
        self._metrics.observe_step(batch[0].job.model, report)
        self._metrics.observe_memory(engine.memory_bytes())
        self._account(batch, expected, report)
        for held in dict.fromkeys(running.held for running in batch):
            states = [running.state for running in self._running if running.held is held]
            self._tell(held.progress(states, time.perf_counter()))
        for running in batch:
            self._preview_if_due(engine, running)

    def _account(self, batch: Sequence[Running], expected: Sequence[Candidate], report: StepReport) -> None:
        """Charge a step to its requests."""
        now = time.perf_counter()
        self._precedence.spend(expected[0].is_high, report.seconds)
        virtual_times = self._fair_share.after_step(expected, report.seconds)
        for running, virtual_time in zip(batch, virtual_times, strict=True):
            self._measure_pace(running, now)
            running.virtual_time = virtual_time
            running.batch_size_sum += report.batch_size
            running.held.steps_done += 1
            running.held.num_steps[running.index] = running.state.num_computed_steps

    def _keep_deadline(self, running: Running) -> None:
        """For a job with a deadline, choose the curve point of the coming steps from the time that is left."""
        job, state = running.job, running.state
        if job.deadline_at is None:
            return
        point = point_for(
            running.request,
            self.cards[job.model],
            time_left_s=job.deadline_at - self._clock() - self.finish_seconds(job.model) - job.decode_seconds,
            steps_left=state.num_steps - state.step_index,
            num_computed=len(state.computed),
            pace=running.pace,
        )
        state.move_to(point)

    def _measure_pace(self, running: Running, now: float) -> None:
        card = self.cards[running.job.model]
        predicted_s = dense_step_seconds(running.request, card) * running.state.point.relative_step_seconds
        running.pace = (now - (running.last_step_ended or running.denoise_began)) / predicted_s
        running.last_step_ended = now

    def _preview_if_due(self, engine: "Engine", running: Running) -> None:
        state = running.state
        due = preview_steps(running.job.num_previews, state.num_computed_steps)[running.num_previews :]
        for step in due:
            if step <= len(state.computed) and not state.is_done:
                preview = PendingPreview(running.claim, running.index, running.num_previews, engine.preview(state))
                self._publisher.preview(preview)
                running.num_previews += 1

    def _decode_done(self, engine: "Engine") -> None:
        """Begin the decoding of requests that took their last step. The publisher does what takes no turns."""
        for running in [running for running in self._running if running.state.is_done and running.decoding is None]:
            running.denoise_ended = running.denoise_ended or time.perf_counter()
            decoding = engine.decode_in_turns(running.state)
            if decoding is None:
                self._publish(running, partial(engine.finish, running.state))
            elif self._has_room_for_grid(running):
                running.decoding = decoding

    def _has_room_for_grid(self, running: Running) -> bool:
        others = sum(other.grid_bytes for other in self._running)
        return not others or others + grid_bytes(running.request) <= self.limits.max_decode_bytes

    def _decode(self, running: Running, decoding: Generator[None, None, FieldSamples]) -> None:
        """Give a mesh its turn."""
        candidate, began = running.as_candidate(), time.perf_counter()
        try:
            while time.perf_counter() - began < DECODE_TURN_S:
                next(decoding)
        except StopIteration as end:
            samples: FieldSamples = end.value
            self._publish(running, lambda: samples)
        except Exception as error:
            self._let_go(running)
            self._publisher.fail(running.claim, error)
        seconds = time.perf_counter() - began
        self._precedence.spend(candidate.is_high, seconds)
        (running.virtual_time,) = self._fair_share.after_step([candidate], seconds)

    def _publish(self, running: Running, decode: Callable[[], Decoded]) -> None:
        """Hand a request to the publisher."""
        assert running.denoise_ended is not None
        denoised = Denoised(
            claim=running.claim,
            index=running.index,
            decode=decode,
            summary=running.state.summary(),
            queue_s=running.queue_s,
            encode_s=running.encode_s,
            denoise_s=running.denoise_ended - running.denoise_began,
            field_s=time.perf_counter() - running.denoise_ended,
            batch_size_mean=running.batch_size_sum / len(running.state.computed),
        )
        self._publisher.publish(denoised, on_artifact=self._look_for_room)
        self._let_go(running)

    def _let_go(self, running: Running) -> None:
        with self._lock:
            self._running.remove(running)
        self._on_room()

    def _look_for_room(self) -> None:
        self._wake.set()
        self._on_room()

    def _tell(self, report: Report) -> None:
        """Report. A job that has ended is no longer held."""
        self._report(report)
        if isinstance(report, Ending):
            self.drop(report.claim.job.id, is_finished=report.status is JobStatus.SUCCEEDED)
