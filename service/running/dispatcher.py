"""Between the job store and the worker: claims what the worker has room for, keeps its leases, stores what it makes."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from models.card import ModelCard
from service.errors import Draining, JobNotFound, StoreUnavailable
from service.jobs.job import Failure, FailureReason, Job, log_fields
from service.jobs.store import Claim, Ending, JobStore, Preview, Progress
from service.metrics import Metrics
from service.running.publisher import Report
from service.running.worker import Worker

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A notice of a new job that was lost is made up for by looking again.
_LOOK_AGAIN_S = 1.0
_RETRY_S = 0.5
RETRY_DELAYS_S = (1, 5, 30, 120, 600)
"""Between the calls of a webhook. After so many failures it is given up; the job can still be asked for."""
# How long `drain` waits, after the grace, for a denoise step that is still running.
LAST_STEP_S = 5.0


@dataclass(frozen=True, slots=True)
class Timing:
    """`lease_s` is how long a job stays with a worker that says nothing, `grace_s` for finishing at the end."""

    lease_s: float
    grace_s: float


class Dispatcher:
    """Used by one event loop, from `running` to its end; `worker` has been started.

    `tell_webhook` says whether the client of a job that has ended could be told so; without it nobody is told.
    """

    def __init__(
        self,
        store: JobStore,
        worker: Worker,
        metrics: Metrics,
        timing: Timing,
        *,
        clock: Callable[[], float],
        tell_webhook: Callable[[Job], Awaitable[bool]] | None = None,
    ) -> None:
        self.store = store
        self.worker = worker
        self.metrics = metrics
        self.timing = timing
        self.has_drained = asyncio.Event()
        self._tell_webhook = tell_webhook
        self._clock = clock
        self._wake = asyncio.Event()
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._unstored: dict[str, Claim] = {}  # by lease: jobs that have ended, but the store does not know yet
        self._drain: asyncio.Task[None] | None = None
        self._background: set[asyncio.Future[object]] = set()

    @property
    def cards(self) -> Mapping[str, ModelCard]:
        return self.worker.cards

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Claim and store until the end, which drains."""
        loop = asyncio.get_running_loop()

        def hear(report: Report) -> None:
            loop.call_soon_threadsafe(self._hear, report)

        def wake() -> None:
            loop.call_soon_threadsafe(self._wake.set)

        self.worker.report, self.worker.on_room = hear, wake
        self.store.changes.on_queued = self._wake.set
        self.store.changes.on_cancelled = self.worker.drop
        self.metrics.declare(self.cards.values())
        await self.store.open()
        loops = (self._claim, self._keep_leases, self._store_reports, self._tell_webhooks)
        tasks: list[asyncio.Future[object]] = [asyncio.create_task(run()) for run in loops]
        for task in tasks:
            task.add_done_callback(self._drain_if_broken)
        try:
            yield
        finally:
            await self.drain()
            tasks += self._background  # what still waits for a store that is away
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # A step that has not ended yet has nobody to tell any more.
            self.worker.report, self.worker.on_room = (lambda report: None), (lambda: None)
            await self.store.close()

    def check_accepting(self) -> None:
        """Raise Draining once the server is shutting down."""
        if self._drain is not None or self.has_drained.is_set():
            raise Draining("the server is shutting down", math.ceil(self.timing.grace_s))

    async def cancel(self, job_id: str) -> Job:
        """A queued job never runs, a running one leaves before its next step; one that has ended stays as it is."""
        job, is_news = await self.store.cancel(job_id)
        if is_news:
            self.worker.drop(job_id)
            self._tell_end(job)
        return job

    def cancel_soon(self, job_id: str) -> None:
        """The same for a client that has gone: if the store can't be reached now, then as soon as it can."""

        async def cancel() -> None:
            with suppress(JobNotFound):
                await self._until_stored(lambda: self.cancel(job_id))

        self.worker.drop(job_id)
        self.in_background(cancel())

    def _drain_if_broken(self, task: asyncio.Future[object]) -> None:
        """A server in which one of the loops has ended would accept jobs and never make them."""
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("the dispatcher stopped", exc_info=error)
            self.in_background(self.drain())

    def in_background(self, work: Awaitable[object]) -> None:
        """Do `work` beside everything else; what is not done at the end is cancelled."""
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def num_running(self) -> Counter[str]:
        """How many jobs of each model this worker holds."""
        return Counter(claim.job.model for claim in self.worker.held())

    async def drain(self) -> None:
        """Finish what was accepted, for the grace at most; what is left goes back to a shared queue, or fails.

        Whoever calls again waits for the same end.
        """
        if self._drain is None:
            self._drain = asyncio.create_task(self._finish_or_give_back())
        await self._drain

    async def _finish_or_give_back(self) -> None:
        grace_ends = time.monotonic() + self.timing.grace_s
        self._wake.set()
        while self.worker.is_alive and time.monotonic() < grace_ends and await self._has_work():
            await asyncio.sleep(0.02)
        left = self.worker.held()
        for claim in left:
            self.worker.drop(claim.job.id)
        try:
            async with asyncio.timeout(LAST_STEP_S):
                await self._give_back(left)
        except (TimeoutError, StoreUnavailable):
            logger.warning("the store can't be reached; %d jobs come back when their leases end", len(left))
        if not await asyncio.to_thread(self.worker.stop, LAST_STEP_S):
            logger.warning("the worker is still in a step after the grace of %g s", self.timing.grace_s)
        self.has_drained.set()

    async def _has_work(self) -> bool:
        if self.worker.held():
            return True
        await asyncio.sleep(0)  # for what the worker told just before it let go
        return bool(self._unstored) or (not self.store.is_shared and bool(await self.store.live_jobs()))

    async def _give_back(self, left: list[Claim]) -> None:
        if self.store.is_shared:
            for claim in left:
                await self.store.release(claim)
            return
        for job in await self.store.live_jobs():
            failure = Failure(FailureReason.DRAINING, f"the server shut down before job {job.id} was finished")
            failed = await self.store.fail(job.id, failure)
            if failed is not None:
                self._tell_end(failed)

    async def _claim(self) -> None:
        """Claim while there is room, whenever there is news of either."""
        while True:
            self._wake.clear()
            if not self.worker.is_alive and self._drain is None:
                self.in_background(self.drain())
            try:
                while self._may_claim() and (claim := await self.store.claim(self.worker.can_take)) is not None:
                    self.worker.take(claim)
            except StoreUnavailable as error:
                logger.warning("nothing can be claimed: %s", error)
                await asyncio.sleep(_RETRY_S)
            # Not wait_for, which forgets that it was cancelled when the event comes at the same time (Python 3.11).
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self._wake.wait()

    def _may_claim(self) -> bool:
        # What a draining server leaves in a shared queue, others take.
        return self.worker.is_alive and (self._drain is None or not self.store.is_shared)

    async def _keep_leases(self) -> None:
        """Renew what the worker holds, drop what it has lost, and queue again what others have lost."""
        while True:
            try:
                for job_id in await self.store.renew([*self.worker.held(), *self._unstored.values()]):
                    logger.warning("the lease was lost", extra={"job_id": job_id})
                    self.worker.drop(job_id)
                recovery = await self.store.recover()
                self.metrics.observe_recovery(len(recovery.requeued))
                for job_id in recovery.requeued:
                    logger.warning("queued again after its worker died", extra={"job_id": job_id})
                for job in recovery.failed:
                    self._tell_end(job)
            except StoreUnavailable as error:
                logger.warning("leases can't be renewed: %s", error)
                await asyncio.sleep(_RETRY_S)
                continue
            await asyncio.sleep(self.timing.lease_s / 4)

    def _hear(self, report: Report) -> None:
        if isinstance(report, Ending):
            self._unstored[report.claim.lease] = report.claim
        self._reports.put_nowait(report)

    async def _store_reports(self) -> None:
        """Store what the worker makes, in its order, however long the store can't be reached."""
        while True:
            reports = [await self._reports.get()]
            while not self._reports.empty():
                reports.append(self._reports.get_nowait())
            latest = {report.claim.lease: report for report in reports if isinstance(report, Progress)}
            for report in reports:
                match report:
                    case Progress() if report is latest[report.claim.lease]:
                        with suppress(StoreUnavailable):
                            await self.store.record(report)
                    case Preview():
                        with suppress(StoreUnavailable):
                            await self.store.add_preview(report)
                    case Ending():
                        await self._until_stored(partial(self._end, report))
                        self._unstored.pop(report.claim.lease, None)

    async def _end(self, ending: Ending) -> None:
        job = await self.store.end(ending)
        if job is not None:
            self._tell_end(job)

    async def _until_stored(self, call: Callable[[], Awaitable[T]]) -> T:
        while True:
            try:
                return await call()
            except StoreUnavailable as error:
                logger.warning("waiting for the store: %s", error)
                await asyncio.sleep(_RETRY_S)

    async def _tell_webhooks(self) -> None:
        """Tell clients of their jobs' ends, one after the other, and again after a while if they don't listen."""
        while self._tell_webhook is not None:
            try:
                while (taken := await self.store.take_webhook()) is not None:
                    job, num_failures = taken
                    if await self._tell_webhook(job) or num_failures == len(RETRY_DELAYS_S):
                        await self.store.settle_webhook(job.id, None)
                    else:
                        await self.store.settle_webhook(job.id, RETRY_DELAYS_S[num_failures])
            except (StoreUnavailable, JobNotFound) as error:
                logger.warning("no webhooks can be told: %s", error)
            await asyncio.sleep(_LOOK_AGAIN_S)

    def _tell_end(self, job: Job) -> None:
        self.metrics.observe_end(job)
        seconds = self._clock() - job.created_at
        logger.info(
            "job ended model=%s pictures=%d status=%s seconds=%.3f",
            *(job.model, len(job.requests), job.status, seconds),
            extra=log_fields(job),
        )
