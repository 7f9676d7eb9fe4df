"""Steps of batches: what a step runs, what happens if it fails, and what it is charged to."""

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

from models.errors import DeviceLost, OutOfDeviceMemory
from models.report import StepReport
from service.jobs.store import Report
from service.running.held import Running, preview_steps
from service.running.parts import WorkerParts
from service.running.publisher import PendingPreview
from service.scheduling.batching import Candidate, group_seconds
from service.scheduling.deadline import point_for, seconds_for_steps, slack_s
from service.scheduling.pace import Pace, Peak

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine

logger = logging.getLogger(__name__)

_FALL = 0.02
"""How fast `Stepper.longest` falls, see `Peak`."""


class Stepper:
    """Used by the worker's thread. It tells progress to `report`, and lets go of requests that fail by `let_go`.

    `on_preview` is called in some thread when a preview has been made, and its memory is free.
    """

    def __init__(
        self,
        parts: WorkerParts,
        *,
        report: Callable[[Report], None],
        let_go: Callable[[Running], None],
        on_preview: Callable[[], None],
    ) -> None:
        self._parts = parts
        self._report = report
        self._let_go = let_go
        self._on_preview = on_preview
        self._most_together: dict[Hashable, int] = {}  # by batch key
        self.pace = Pace()
        """Of steps alone."""
        self.longest = Peak(_FALL)
        """What a step takes lately, at most."""

    def step(self, engine: "Engine", batch: Sequence[Running], running_now: Sequence[Running]) -> None:
        """Run one computed step of `batch`. If it fails, repeat it for each half, so that only the culprits fail.

        `running_now` are all running requests, from which the progress of their jobs follows. Raises DeviceLost.
        """
        for running in batch:
            self._keep_deadline(engine, running, running_now)
        expected, states = [running.as_candidate() for running in batch], [running.state for running in batch]
        try:
            if len(batch) == 1:
                report = self._parts.device.call(lambda: engine.step(states))
            else:
                with self._parts.device.shared():
                    report = engine.step(states)
        except DeviceLost:
            raise
        except Exception as error:
            if len(batch) == 1:
                self._let_go(batch[0])
                self._parts.publisher.fail(batch[0].claim, error)
                return
            logger.warning("a step of %d requests failed; its halves step alone now", len(batch), exc_info=error)
            if isinstance(error, OutOfDeviceMemory):
                self._most_together[states[0].batch_key] = len(batch) // 2
        else:
            self._conclude(engine, batch, expected, report, running_now)
            return
        middle = (len(batch) + 1) // 2
        for half in (batch[:middle], batch[middle:]):
            self.step(engine, half, running_now)

    def note_slack(self, engine: "Engine", ready: Sequence[Running]) -> None:
        """Note how long those with a deadline can wait for others."""
        for running in ready:
            job, state = running.job, running.state
            if job.deadline_at is None:
                continue
            if running.decoding is not None:
                running.slack_s = job.deadline_at - self._parts.clock() - running.left_s
            else:
                running.slack_s = slack_s(
                    running.request,
                    engine.cards[job.model],
                    time_left_s=self._time_left(engine, running),
                    steps_left=state.num_steps - state.step_index,
                    num_computed=len(state.computed),
                    pace=self.pace.ratio or 1.0,  # a clock may stand still for a step
                )

    def most_together(self, batch_key: Hashable) -> int | None:
        """How many requests may share a step, if more ran out of memory lately."""
        return self._most_together.get(batch_key)

    def forget_failures(self) -> None:
        """Let steps be shared as before: memory has become free."""
        self._most_together.clear()

    def _conclude(
        self,
        engine: "Engine",
        batch: Sequence[Running],
        expected: Sequence[Candidate],
        report: StepReport,
        running_now: Sequence[Running],
    ) -> None:
        """Tell what a step has done, and make the previews that are due after it."""
        self._parts.metrics.observe_step(batch[0].job.model, report)
        self._parts.metrics.observe_memory({**engine.memory_bytes(), **self._parts.room.kinds(running_now)})
        self._account(engine, batch, expected, report)
        for held in dict.fromkeys(running.held for running in batch):
            states = [running.state for running in running_now if running.held is held]
            self._report(held.progress(states, time.perf_counter()))
        for running in batch:
            self._preview_if_due(engine, running, running_now)

    def _account(
        self, engine: "Engine", batch: Sequence[Running], expected: Sequence[Candidate], report: StepReport
    ) -> None:
        """Charge a step to its requests."""
        now = time.perf_counter()
        self.pace.begin(now - report.seconds)
        self.pace.advance(group_seconds(expected), now)
        self._parts.precedence.spend(
            expected[0].is_high, report.seconds, has_deadline=batch[0].job.deadline_at is not None
        )
        self.longest.observe(report.seconds)
        for running, candidate in zip(batch, expected, strict=True):
            running.measure_pace(engine.cards[running.job.model], now - report.seconds, now)
            running.spend(self._parts.fair_share, candidate.step_seconds)
            running.batch_size_sum += report.batch_size
            running.held.steps_done += 1
            running.held.num_steps[running.index] = running.state.num_computed_steps

    def _keep_deadline(self, engine: "Engine", running: Running, running_now: Sequence[Running]) -> None:
        """For a job with a deadline, choose the curve point of the coming steps from the time that is left.

        Beside others with a deadline it gets no better than planned, so that these have their time.
        """
        job, state = running.job, running.state
        if job.deadline_at is None:
            return
        is_alone = all(other.job.deadline_at is None for other in running_now if other.held is not running.held)
        point = point_for(
            running.request,
            engine.cards[job.model],
            time_left_s=self._time_left(engine, running),
            steps_left=state.num_steps - state.step_index,
            num_computed=len(state.computed),
            pace=running.pace,
            best=1.0 if is_alone else running.request.point.quality,
        )
        state.move_to(point)

    def _time_left(self, engine: "Engine", running: Running) -> float:
        """Seconds until the last step of a job with a deadline must end."""
        job = running.job
        assert job.deadline_at is not None
        return seconds_for_steps(
            running.request,
            engine.cards[job.model],
            left_s=job.deadline_at - self._parts.clock() - job.decode_seconds,
            finish_s=self._parts.publisher.finish_seconds(job.model),
        )

    def _preview_if_due(self, engine: "Engine", running: Running, running_now: Sequence[Running]) -> None:
        state = running.state
        due = preview_steps(running.job.num_previews, state.num_computed_steps)[running.num_previews :]
        for step in due:
            if step <= len(state.computed) and not state.is_done:
                if not self._parts.room.for_preview(running, running_now):
                    return  # it is made after a later step, or never
                decode, number = engine.preview(state), running.num_previews
                preview = PendingPreview(running.claim, running.index, number, decode, running.memory.preview)
                self._parts.publisher.preview(preview, on_preview=self._on_preview)
                running.num_previews += 1
