"""Between the job store and the worker: claims jobs, keeps their leases, and stores what the worker reports.

An API node has no worker: it cancels jobs, recovers those of dead workers, and calls webhooks.
"""

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.card import ModelCard
from service.errors import Draining, JobNotFound, JobUnreadable, StoreUnavailable
from service.jobs.job import Failure, FailureReason, JobSnapshot, log_fields
from service.jobs.store import Claim, JobStore
from service.metrics import Metrics
from service.running.fleet import Fleet
from service.running.inbox import Inbox
from service.running.reports import RETRY_S, Reports
from service.running.webhook_calls import WebhookCalls
from service.scheduling.admission import Intake, Promises
from service.scheduling.fleet import WorkerRecord
from service.scheduling.pace import Peak

if TYPE_CHECKING:  # brings what models are computed with, which an API node never loads
    from service.running.worker import Worker

logger = logging.getLogger(__name__)

POLL_S = 1.0
"""Notifications can be lost, so the queue is also polled at this interval."""
_FALL = 0.1
"""How fast `Dispatcher.delivery_s` falls, see `Peak`."""
_DELIVERY_KEPT_S = 30.0
"""For how long it counts. Else one slow answer could lead to refusals, and these leave no answer to measure."""
LAST_STEP_S = 5.0
"""How long a shutdown waits, after the grace period, for a denoise step that is still running, and for other ends."""


@dataclass(frozen=True, slots=True)
class Timing:
    """`lease_s`: how long a job stays with a silent worker. `grace_s`: how long jobs may finish at shutdown."""

    lease_s: float
    grace_s: float


class Dispatcher:
    """Runs in one event loop, within `running`; the caller has started the `worker`, if any, which reports to `inbox`.

    `models` are those that should be served, see `Fleet`. `deliver_webhook` calls the webhook of an ended job, and
    returns whether that succeeded. Without it, none is called.
    """

    def __init__(
        self,
        store: JobStore,
        worker: "Worker | None",
        inbox: Inbox,
        metrics: Metrics,
        timing: Timing,
        *,
        clock: Callable[[], float],
        models: Sequence[str] = (),
        deliver_webhook: Callable[[JobSnapshot], Awaitable[bool]] | None = None,
    ) -> None:
        self.store = store
        self.metrics = metrics
        self.timing = timing
        self.fleet = Fleet(store, self._own_record, models)
        self.claiming = asyncio.Lock()
        """Held while a job is claimed, until the worker has it."""
        self._worker = worker
        self._num_calls = 0
        self._has_news_of_own = asyncio.Event()
        self.work_intake, self.image_intake = Intake(), Intake()
        self.intakes_of_keys: defaultdict[str | None, Intake] = defaultdict(Intake)
        """What each API key is part of `work_intake` with."""
        self.promises = Promises()
        self._delivery, self._delivered_at = Peak(_FALL), -math.inf
        self.has_drained = asyncio.Event()
        self._has_broken_loop = False
        self._inbox = inbox
        self._deliver_webhook = deliver_webhook
        self._clock = clock
        self._drain: asyncio.Task[None] | None = None
        self._background: set[asyncio.Future[object]] = set()
        self._reports = Reports(store, inbox, self.in_background, self._record_end)

    @property
    def worker(self) -> "Worker":
        """Of a server that has one."""
        assert self._worker is not None
        return self._worker

    @property
    def has_worker(self) -> bool:
        return self._worker is not None

    @property
    def cards(self) -> Mapping[str, ModelCard]:
        """The models that can be asked for."""
        return self.fleet.cards

    @property
    def is_broken(self) -> bool:
        """Whether one of its loops or the worker has failed. It drains then, or has drained."""
        return self._has_broken_loop or (self._worker is not None and self._worker.is_broken)

    @property
    def delivery_s(self) -> float:
        """From a finished file to its answer lately, at most: little, unless this process is very busy."""
        is_recent = time.monotonic() - self._delivered_at <= _DELIVERY_KEPT_S
        return self._delivery.seconds if is_recent else 0.0

    def note_delivery(self, seconds: float) -> None:
        """An answer took so long after its file was finished."""
        if not self.delivery_s:
            self._delivery = Peak(_FALL)
        self._delivery.observe(seconds)
        self._delivered_at = time.monotonic()

    def _own_record(self) -> WorkerRecord | None:
        if self._worker is None:
            return None
        return self._worker.record(self.store.worker_id, is_leaving=self._drain is not None)

    def announce_soon(self) -> None:
        """Tell other processes at once what the worker is now."""
        self.metrics.declare(self.worker.cards.values())
        self._has_news_of_own.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Claim jobs and store results while the context lasts; drain at its end."""
        self._inbox.connect()
        await self.store.open(on_queued=self._inbox.news.set, on_cancelled=self._drop)
        with suppress(StoreUnavailable):
            await self.fleet.refresh()  # so that the first call finds the models
        loops = [self._watch_fleet, self._recover]
        if self._worker is not None:
            self.metrics.declare(self._worker.cards.values())
            loops += [self._claim, self._announce, self._keep_leases, self._reports.run]
        if self._deliver_webhook is not None:
            loops.append(WebhookCalls(self.store, self._deliver_webhook).run)
        tasks: list[asyncio.Future[object]] = [asyncio.create_task(run()) for run in loops]
        for task in tasks:
            task.add_done_callback(self._drain_if_broken)
        try:
            yield
        finally:
            await self.drain()
            tasks += self._background  # tasks that still wait for an unreachable store
            for task in tasks:
                task.cancel()
            # Not for ever: a library that loses a cancellation must not keep the process from ending.
            if (await asyncio.wait(tasks, timeout=LAST_STEP_S))[1]:
                logger.warning("a part of the dispatcher does not end; the server ends without it")
            self._inbox.disconnect()  # reports of a step that is still running are dropped
            closing = asyncio.create_task(self._close_store())
            if (await asyncio.wait([closing], timeout=LAST_STEP_S))[1]:
                logger.warning("the job store does not close; the server ends without that")
            else:
                closing.result()

    async def _close_store(self) -> None:
        if self._worker is not None:
            with suppress(StoreUnavailable):  # then it counts as living until its leases would end
                await self.store.withdraw()
        await self.store.close()

    def check_accepting(self) -> None:
        """Raise Draining once the server is shutting down, StoreUnavailable while finished jobs can't be stored."""
        if self._drain is not None or self.has_drained.is_set():
            raise Draining("the server is shutting down", math.ceil(self.timing.grace_s))
        if (why := self._reports.why_stuck) is not None:
            raise StoreUnavailable(f"finished jobs can't be stored: {why}")

    async def backlog_s(self, model: str) -> float:
        """Seconds of the work before a new job of `model`; infinite if no worker holds it. Raises StoreUnavailable."""
        return self.fleet.seconds_before(model, await self.store.load())

    @contextmanager
    def open_call(self) -> Iterator[None]:
        """The context in which a client waits for a job. An API node that drains waits for it."""
        self._num_calls += 1
        try:
            yield
        finally:
            self._num_calls -= 1

    def _drop(self, job_id: str) -> None:
        if self._worker is not None:
            self._worker.drop(job_id)

    async def cancel(self, job_id: str) -> JobSnapshot:
        """Cancel a job: a queued job never runs, a running job stops before its next step.

        A job that has ended stays as it is. Raises JobNotFound, StoreUnavailable.
        """
        snapshot, is_cancelled_now = await self.store.cancel(job_id)
        if is_cancelled_now:
            self._drop(job_id)
            self._record_end(snapshot)
        return snapshot

    def cancel_soon(self, job_id: str) -> None:
        """Cancel the job of a client that has disconnected, as soon as the store can be reached."""

        async def cancel() -> None:
            with suppress(JobNotFound, JobUnreadable):
                while True:
                    try:
                        await self.cancel(job_id)
                        return
                    except StoreUnavailable as error:
                        logger.warning("waiting for the store: %s", error)
                        await asyncio.sleep(RETRY_S)

        self._drop(job_id)
        self.in_background(cancel())

    def _drain_if_broken(self, task: asyncio.Future[object]) -> None:
        """Drain if one of the loops has failed: the server would accept jobs that it never finishes."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the dispatcher stopped", exc_info=error)
            self._has_broken_loop = True
            self.in_background(self.drain())

    def in_background(self, work: Awaitable[object]) -> None:
        """Run `work` as a task; it is cancelled if it is not done when the dispatcher ends."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def num_running(self) -> Counter[str]:
        """How many jobs of each model this worker holds."""
        return Counter() if self._worker is None else Counter(claim.job.model for claim in self._worker.held())

    async def drain(self) -> None:
        """Finish the accepted jobs within the grace period; release the others to a shared queue, or fail them.

        Without a worker, other processes finish them, and only open calls have that time. All calls wait for one and
        the same draining.
        """
        if self._drain is None:
            drain = self._let_calls_end if self._worker is None else self._finish_or_give_back
            self._drain = asyncio.create_task(drain())
        await self._drain

    async def _let_calls_end(self) -> None:
        grace_ends = time.monotonic() + self.timing.grace_s
        while self._num_calls and time.monotonic() < grace_ends:
            await asyncio.sleep(0.02)
        self.has_drained.set()

    async def _finish_or_give_back(self) -> None:
        grace_ends = time.monotonic() + self.timing.grace_s
        self._inbox.news.set()
        self._has_news_of_own.set()
        while self.worker.is_alive and time.monotonic() < grace_ends and await self._has_work():
            await asyncio.sleep(0.02)
        left, suspects = self.worker.held(), self.worker.suspects()
        for claim in left:
            self.worker.drop(claim.job.id)
        try:
            async with asyncio.timeout(LAST_STEP_S):
                await self._give_back(left, suspects)
        except (TimeoutError, StoreUnavailable):
            logger.warning("the store can't be reached; %d jobs are queued again when their leases end", len(left))
        if not await asyncio.to_thread(self.worker.stop, LAST_STEP_S):
            logger.warning("the worker is still in a step after the grace period of %g s", self.timing.grace_s)
        self.has_drained.set()

    async def _has_work(self) -> bool:
        if self.worker.held():
            return True
        await asyncio.sleep(0)  # receive what the worker reported just before it let go of its last job
        return bool(self._inbox.unstored) or (not self.store.is_shared and bool((await self.store.load()).models))

    async def _give_back(self, left: list[Claim], suspects: set[str]) -> None:
        """Jobs that may have broken the worker keep their leases, so that their end counts as that of a dead worker.

        Else such a job would go on from worker to worker for ever.
        """
        if self.store.is_shared:
            for claim in left:
                if claim.lease not in suspects:
                    await self.store.release(claim)
            if suspects:
                logger.warning("%d jobs that were running are queued again when their leases end", len(suspects))
            return
        why = "had to restart" if self.is_broken else "shut down"
        for live in await self.store.live_jobs():
            failure = Failure(FailureReason.DRAINING, f"the server {why} before job {live.job.id} was finished")
            failed = await self.store.fail(live.job.id, failure)
            if failed is not None:
                self._record_end(failed)

    async def _claim(self) -> None:
        """Claim jobs while the worker has room, and again whenever a job arrives or room becomes free."""
        while True:
            self._inbox.news.clear()
            if not self.worker.is_alive and self._drain is None:
                self.in_background(self.drain())
            try:
                while self._may_claim() and await self._claim_one():
                    pass
            except StoreUnavailable as error:
                logger.warning("nothing can be claimed: %s", error)
                await asyncio.sleep(RETRY_S)
            # Not wait_for, which loses a cancellation that comes together with the event (Python 3.11).
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._inbox.news.wait()

    async def _claim_one(self) -> bool:
        async with self.claiming:
            claim = await self.store.claim(self.worker.fits())
            if claim is None:
                return False
            if not self.worker.held():
                self._has_news_of_own.set()  # idle until now: others must not count it as one that can end
            self.worker.take(claim)
            return True

    def _may_claim(self) -> bool:
        # Results that wait to be stored are in memory, so they count as running.
        has_room = self._reports.why_stuck is None and len(self._inbox.unstored) < self.worker.limits.max_running
        # Other servers claim the jobs that a draining server leaves in a shared queue.
        can_claim = self.worker.is_alive and (self._drain is None or not self.store.is_shared)
        return has_room and can_claim and not self.worker.is_full

    async def _keep_leases(self) -> None:
        """Renew the leases of this worker, and drop the jobs whose lease is lost."""
        while True:
            try:
                for job_id in await self.store.renew([*self.worker.held(), *self._inbox.unstored]):
                    logger.warning("the lease was lost", extra={"job_id": job_id})
                    self.worker.drop(job_id)
            except StoreUnavailable as error:
                logger.warning("leases can't be renewed: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            await asyncio.sleep(self.timing.lease_s / 4)

    async def _announce(self) -> None:
        """Say what the worker is: as often as its leases are renewed, and whenever its models or its state change."""
        while True:
            self._has_news_of_own.clear()
            record = self._own_record()
            assert record is not None
            try:
                await self.store.announce(record)
            except StoreUnavailable as error:
                logger.warning("the worker can't be announced: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self.timing.lease_s / 4):
                    await self._has_news_of_own.wait()

    async def _watch_fleet(self) -> None:
        """Look which workers live."""
        while True:
            with suppress(StoreUnavailable):  # the store counts its own errors
                await self.fleet.refresh()
            await asyncio.sleep(POLL_S)

    async def _recover(self) -> None:
        """Recover the jobs of dead workers."""
        while True:
            try:
                recovery = await self.store.recover()
                self.metrics.observe_recovery(len(recovery.requeued))
                for job_id in recovery.requeued:
                    logger.warning("queued again after its worker died", extra={"job_id": job_id})
                for failed in recovery.failed:
                    self._record_end(failed)
            except StoreUnavailable as error:
                logger.warning("jobs of dead workers can't be recovered: %s", error)
                await asyncio.sleep(RETRY_S)
                continue
            await asyncio.sleep(self.timing.lease_s / 4)

    def _record_end(self, snapshot: JobSnapshot) -> None:
        """Count and log an ended job."""
        job, state = snapshot.job, snapshot.state
        self.metrics.observe_end(snapshot)
        logger.info(
            "job ended model=%s artifacts=%d status=%s seconds=%.3f",
            *(job.model, len(job.requests), state.status, self._clock() - job.created_at),
            extra=log_fields(job),
        )
