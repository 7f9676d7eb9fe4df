"""The loop that runs claimed jobs: start, step, decode, publish. One thread has the device."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING

from models.card import ModelCard
from models.errors import DeviceLost
from service.jobs.job import JobStatus
from service.jobs.store import Claim, Ending, Fit, Fits, JobKind, Report
from service.metrics import Metrics
from service.running.decoding import Decoder
from service.running.device_use import DeviceUse
from service.running.engine_changes import EngineChanges
from service.running.held import HeldJob, Running
from service.running.parts import WorkerParts
from service.running.publisher import Publisher
from service.running.room import Room, WorkerLimits
from service.running.starting import Starter
from service.running.stepping import Stepper
from service.scheduling.batching import FairShare
from service.scheduling.fleet import WorkerRecord, WorkerState
from service.scheduling.pace import Pace
from service.scheduling.precedence import Precedence

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine

logger = logging.getLogger(__name__)

_SHORT_OF_MEMORY_S = 60.0
"""How long a worker counts as short of memory after a request had to wait for some."""


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
        device: str = "cpu",
        version: str = "",
        report: Callable[[Report], None],
        on_room: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.limits = limits
        self.cards: Mapping[str, ModelCard] = {}
        """Those of the models whose jobs it takes."""
        self.is_broken = False
        """Whether the thread has ended because of an error."""
        self.pace = Pace()
        self._device_name = device
        self._version = version
        self._report = report
        self._on_room = on_room
        self._metrics = metrics
        self._load_engine = load_engine
        self._engine: Engine | None = None
        self._clock = clock
        self._wake = Event()
        self._device = DeviceUse()
        self._device_lost: DeviceLost | None = None
        self._loaded: Future[None] = Future()
        self._thread = Thread(target=self._run, name="worker", daemon=True)
        self._is_stopping = False
        self._changes = EngineChanges()
        self._lock = Lock()  # protects the attributes that several threads use: `_held` and `_running`
        self._held: dict[str, HeldJob] = {}
        self._running: list[Running] = []
        self._short_of_memory_until = -math.inf
        self._publisher = Publisher(
            metrics,
            self._tell,
            self.is_held,
            device=self._device,
            on_device_lost=self._stop_without_device,
            clock=clock,
        )
        self._room = Room(limits, self._publisher)
        self._fair_share, self._precedence = FairShare(), Precedence()
        parts = WorkerParts(
            metrics=metrics,
            publisher=self._publisher,
            room=self._room,
            device=self._device,
            fair_share=self._fair_share,
            precedence=self._precedence,
            clock=clock,
        )
        self._starter = Starter(
            parts,
            classes=self._classes,
            claim_place=self._claim_place,
            add=self._add,
            is_held=self.is_held,
            on_ready=self._wake.set,
        )
        self._stepper = Stepper(parts, report=self._tell, let_go=self._let_go, on_preview=self._look_for_room)
        self._decoder = Decoder(parts, let_go=self._let_go, on_artifact=self._look_for_room)

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

    def record(self, worker_id: str, *, is_leaving: bool) -> WorkerRecord:
        """What to tell other processes of this worker."""
        held, cards = self.held(), self.cards
        busy = WorkerState.BUSY if held else WorkerState.IDLE
        finish_s = {model: self.finish_seconds(model) for model in cards}
        return WorkerRecord(
            id=worker_id,
            version=self._version,
            device=self._device_name,
            state=WorkerState.DRAINING if is_leaving else busy,
            cards=cards,
            pace=self.pace.ratio,
            finish_s={model: seconds for model, seconds in finish_s.items() if seconds},
            num_held=sum(len(claim.job.requests) for claim in held),
            max_running=self.limits.max_running,
            step_s=max([self._stepper.longest.seconds, *(card.dense_step_seconds for card in cards.values())]),
            step_pace=self._stepper.pace.ratio or 1.0,  # a clock may stand still for a step
            urgent_waits=not self._room.keeps_places or time.perf_counter() < self._short_of_memory_until,
        )

    def withhold(self, model: str) -> None:
        """Take no more jobs of a model."""
        self.cards = {name: card for name, card in self.cards.items() if name != model}

    def change_models(self, change: "Callable[[Engine], None]") -> Future[None]:
        """Let `change` add or remove models of the engine, between two turns. The future has what it raises."""
        done = self._changes.ask(change)
        self._wake.set()
        return done

    def fits(self) -> Fits:
        """What to claim: requests that could start before any that waits here.

        One that the device could run, but has no memory for now, waits. One that the device could never run is left to
        other workers.
        """

        def fits(kind: JobKind) -> Fit:
            if kind.model not in self.cards or not self._room.is_large_enough(kind.memory):
                return Fit.NO
            with self._lock:
                waiting = [held for held in self._held.values() for _ in held.unstarted]
                if not self._room.has_place(kind, waiting, self._running):
                    return Fit.NO
                if self._room.has_memory(kind, waiting, self._running):
                    return Fit.NOW
                self._short_of_memory_until = time.perf_counter() + _SHORT_OF_MEMORY_S
                return Fit.WAITS

        return fits

    @property
    def is_full(self) -> bool:
        """Whether it holds as many requests as it may, so that no kind of job `fits`."""
        with self._lock:
            num_waiting = sum(len(held.unstarted) for held in self._held.values())
            return self._room.is_full(num_waiting + len(self._running))

    def take(self, claim: Claim) -> None:
        """Run this job, which was claimed because it `fits`."""
        job = claim.job
        held = HeldJob(
            claim,
            replace(JobKind.of(job), memory=self._room.cards[job.model].memory_of(job.requests[0])),
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

    def suspects(self) -> set[str]:
        """Leases of the jobs that were running when the thread ended because of an error: one may be the cause."""
        if not self.is_broken:
            return set()
        with self._lock:
            return {held.claim.lease for held in self._held.values() if held.has_begun}

    def finish_seconds(self, model: str) -> float:
        """How long decoding and encoding takes lately at the model's default size; 0 before the first result."""
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
        self._take_cards(engine)
        self._loaded.set_result(None)
        try:
            while True:
                # First, so that anything that arrives from here on, such as `stop`, wakes the loop again.
                self._wake.clear()
                if self._is_stopping:
                    break
                self._take_turn(engine)
        except DeviceLost as error:
            logger.critical("%s; the process ends, and a new one can use the device again", error, exc_info=error)
            self.is_broken = True
        except Exception:
            logger.exception("the worker stopped")
            self.is_broken = True
        finally:
            self._starter.close()
            self._publisher.close()
            self._changes.refuse()
            self._on_room()

    def _take_cards(self, engine: "Engine") -> None:
        self.cards = self._room.cards = self._publisher.cards = engine.cards

    def _take_turn(self, engine: "Engine") -> None:
        if self._device_lost is not None:
            raise self._device_lost
        self._drop_unwanted()
        self._changes.make(engine, self._device, on_change=self._take_cards)
        self._decoder.begin(engine, self._running)
        with self._lock:
            jobs = list(self._held.values())
        self._starter.start_what_fits(engine, jobs)
        if self._ready():
            batch = self._next_batch(engine)
            if not batch:
                self._wake.wait()  # until a decoding has ended
            elif batch[0].decoding is None:
                self._stepper.step(engine, batch, self._running)
            else:
                self._decoder.take_turn(engine, batch[0], batch[0].decoding)
        else:
            self._metrics.observe_groups(self.cards, [])
            self._metrics.observe_memory({**engine.memory_bytes(), **self._room.kinds(self._running)})
            self._wake.wait()

    def _drop_unwanted(self) -> None:
        """Free the memory of requests whose job was cancelled or has failed."""
        unwanted = [running for running in self._running if not self.is_held(running.claim)]
        for running in unwanted:
            self._remove(running)
        if unwanted:
            self._on_room()
        self._publisher.drop_unwanted()

    def _claim_place(self, held: HeldJob, index: int) -> bool:
        """Whether a request can start now. It then no longer waits."""
        with self._lock:
            has_place = self._room.has_place(held.kind, [], self._running)
            has_room = has_place and self._room.has_memory(held.kind, [], self._running)
            if has_room and index in held.unstarted:
                held.unstarted.remove(index)
            return has_room

    def _add(self, running: Running) -> None:
        with self._lock:
            self._running.append(running)

    def _classes(self) -> set[bool]:
        """Whether those that can have a turn, and those that start before others, are of high priority."""
        with self._lock:
            starting = {True for held in self._held.values() if held.unstarted and held.job.is_high}
        return starting | {running.job.is_high for running in self._ready()}

    def _ready(self) -> list[Running]:
        """Those that can have a turn: all but those that wait until there is room for their grid."""
        return [running for running in self._running if running.decoding is not None or not running.state.is_done]

    def _next_batch(self, engine: "Engine") -> Sequence[Running]:
        """The requests that share the next step, or the one whose decoding has a turn. None while they lack memory."""
        ready = self._ready()
        self._stepper.note_slack(engine, ready)
        groups = self._precedence.groups([running.as_candidate() for running in ready], time.perf_counter())
        self._metrics.observe_groups(self.cards, [ready[group[0]].job.model for group in groups])
        batch = self._room.cut([ready[index] for index in groups[0]], self._running)
        return batch[: self._stepper.most_together(batch[0].state.batch_key)] if batch else []

    def _remove(self, running: Running) -> None:
        with self._lock:
            self._running.remove(running)
        running.spend(self._fair_share, running.left_s)

    def _let_go(self, running: Running) -> None:
        self._remove(running)
        self._stepper.forget_failures()
        self._on_room()

    def _stop_without_device(self, error: DeviceLost) -> None:
        self._device_lost = error
        self._wake.set()

    def _look_for_room(self) -> None:
        self._wake.set()
        self._on_room()

    def _tell(self, report: Report) -> None:
        """Report. A job that has ended is no longer held."""
        self._report(report)
        if isinstance(report, Ending):
            self.drop(report.claim.job.id, is_finished=report.status is JobStatus.SUCCEEDED)
