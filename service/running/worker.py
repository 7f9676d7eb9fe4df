"""The loop that runs claimed jobs: start, step, decode a mesh's field, publish. One thread has the device."""

import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

from models.card import ModelCard
from models.memory import RequestMemory
from models.mesh.surface import FieldSamples
from models.report import StepReport
from service.jobs.job import Job, JobStatus
from service.jobs.store import Claim, Ending, Fits
from service.metrics import Metrics
from service.running.held import DECODE_TURN_S, HeldJob, Running, preview_steps
from service.running.preparer import Preparer
from service.running.publisher import Decoded, Denoised, PendingPreview, Publisher, Report
from service.running.room import Newcomer, Room, WorkerLimits
from service.scheduling.batching import Candidate, FairShare, shape_of
from service.scheduling.cost import block_seconds, dense_step_seconds
from service.scheduling.deadline import point_for
from service.scheduling.pace import Pace
from service.scheduling.precedence import Precedence

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine

logger = logging.getLogger(__name__)


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
        self._clock = clock
        self._wake = Event()
        self._publisher = Publisher(metrics, self._tell, self.is_held, clock=clock)
        self._room = Room(limits, self._publisher)
        self._preparer = Preparer(on_prepared=self._wake.set)
        self._loaded: Future[None] = Future()
        self._thread = Thread(target=self._run, name="worker", daemon=True)
        self._is_stopping = False
        self._lock = Lock()  # protects the attributes that several threads use: `_held` and `_running`
        self._held: dict[str, HeldJob] = {}
        self._running: list[Running] = []
        self._fair_share = FairShare()
        self._precedence = Precedence()

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

    def fits(self) -> Fits:
        """What to claim in one look at the queue: requests that could start before any that waits here.

        One that the device could run, but has no memory for now, holds up those behind it, so that it is not overtaken
        for ever. One that the device could never run is left to other workers.
        """
        has_to_wait = False

        def fits(model: str, shape: str, is_high: bool, memory: RequestMemory) -> bool:
            nonlocal has_to_wait
            if has_to_wait or model not in self.cards or not self._room.is_large_enough(memory):
                return False
            new = Newcomer(model, shape, is_high, memory)
            with self._lock:
                waiting = [held for held in self._held.values() for _ in held.unstarted]
                if not self._room.has_place(new, waiting, self._running):
                    return False
                has_to_wait = not self._room.has_memory(new, waiting, self._running)
            return not has_to_wait

        return fits

    def take(self, claim: Claim) -> None:
        """Run this job, which was claimed because it `fits`."""
        job = claim.job
        held = HeldJob(
            claim,
            shape_of(job.requests[0]),
            self.cards[job.model].memory_of(job.requests[0]),
            unstarted=list(range(len(job.requests))),
            num_steps=[request.num_computed_steps for request in job.requests],
        )
        with self._lock:
            if not self._held:
                self.pace.begin(held.began)
            self._held[job.id] = held
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
        self.cards = self._room.cards = engine.cards
        self._loaded.set_result(None)
        try:
            while not self._is_stopping:
                self._take_turn(engine)
        except Exception:
            logger.exception("the worker stopped")
            self.is_broken = True
        finally:
            self._preparer.close()
            self._publisher.close()
            self._on_room()

    def _take_turn(self, engine: "Engine") -> None:
        self._wake.clear()  # first, so that anything that arrives from here on wakes the loop again
        self._drop_unwanted()
        self._decode_done(engine)
        self._start_what_fits(engine)
        if self._ready():
            batch = self._next_batch()
            if not batch:
                self._wake.wait()  # until a decoding has ended
            elif batch[0].decoding is None:
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

    def _start_what_fits(self, engine: "Engine") -> None:
        with self._lock:
            waiting = [(held, index) for held in self._held.values() for index in held.unstarted]
        for held, index in waiting:
            if not self._is_prepared(engine, held, index) or self._keeps_out(held.job):
                continue
            new = Newcomer(held.job.model, held.shape, held.job.is_high, held.memory)
            with self._lock:
                has_place = self._room.has_place(new, [], self._running)
                has_room = has_place and self._room.has_memory(new, [], self._running)
                if has_room and index in held.unstarted:
                    held.unstarted.remove(index)
            if has_room:
                self._start(engine, held, index)

    def _keeps_out(self, job: Job) -> bool:
        """Whether starting it, which encodes its prompt or image, would be in the way of those of high priority."""
        classes, needed_s = {ready.job.is_high for ready in self._ready()}, self.cards[job.model].encode_seconds
        return not job.is_high and len(classes) == 2 and not self._precedence.are_owed(needed_s)

    def _is_prepared(self, engine: "Engine", held: HeldJob, index: int) -> bool:
        """Whether a request can start. If another process can do a part of that, it begins here."""
        if index not in held.prepared:
            preparation = engine.preparation(held.job.requests[index])
            if preparation is None:
                return True
            held.prepared[index] = self._preparer.prepare(preparation, partial(self.is_held, held.claim))
        return held.prepared[index].done()

    def _start(self, engine: "Engine", held: HeldJob, index: int) -> None:
        if not self.is_held(held.claim):  # an earlier request of the job has failed
            return
        job, request = held.job, held.job.requests[index]
        queue_s = max(0.0, self._clock() - job.created_at)  # clocks agree only roughly
        began = time.perf_counter()
        try:
            state = engine.start(held.prepared[index].result() if index in held.prepared else request)
        except Exception as error:
            self._publisher.fail(held.claim, error)
            return
        now = time.perf_counter()
        self._metrics.observe_stage(job.model, "encode", now - began)
        self._precedence.spend(job.is_high, now - began)
        running = Running(
            held=held,
            index=index,
            state=state,
            queue_s=queue_s,
            encode_s=now - began,
            denoise_began=now,
            virtual_time=self._fair_share.at_start,
            block_seconds=block_seconds(request, self.cards[job.model]),
        )
        with self._lock:
            self._running.append(running)

    def _ready(self) -> list[Running]:
        """Those that can have a turn: all but those that wait until there is room for their grid."""
        return [running for running in self._running if running.decoding is not None or not running.state.is_done]

    def _next_batch(self) -> Sequence[Running]:
        """The requests that share the next step, or the one whose decoding has a turn. None while they lack memory."""
        ready = self._ready()
        groups = self._precedence.groups([running.as_candidate() for running in ready], time.perf_counter())
        self._metrics.observe_groups(self.cards, [ready[group[0]].job.model for group in groups])
        return self._room.cut([ready[index] for index in groups[0]], self._running)

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
        self._metrics.observe_memory({**engine.memory_bytes(), **self._room.kinds(self._running)})
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
                if not self._room.for_preview(running, self._running):
                    return  # it is made after a later step, or never
                decode, number = engine.preview(state), running.num_previews
                preview = PendingPreview(running.claim, running.index, number, decode, running.memory.preview)
                self._publisher.preview(preview, on_preview=self._look_for_room)
                running.num_previews += 1

    def _decode_done(self, engine: "Engine") -> None:
        """Begin the decoding of requests that took their last step. The publisher does what takes no turns."""
        for running in [running for running in self._running if running.state.is_done and running.decoding is None]:
            running.denoise_ended = running.denoise_ended or time.perf_counter()
            decoding = engine.decode_in_turns(running.state)
            if decoding is not None:
                if self._room.for_grid(running, self._running):
                    running.decoding = decoding
            elif self._room.for_decoding(running, self._running):
                self._publish(running, partial(engine.finish, running.state))
            else:
                return  # those behind it wait as well, so that it gets its turn

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
            memory=replace(running.memory, decode=0) if running.decoding else running.memory,
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
