"""Stores what the worker reports. Ends wait for an unreachable store; progress and previews do not."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from service.errors import StoreUnavailable
from service.jobs.job import JobSnapshot, log_fields
from service.jobs.store import Claim, Ending, JobStore, Preview, Progress
from service.running.inbox import Inbox

logger = logging.getLogger(__name__)

RETRY_S = 0.5
"""Delay before the next try of a call to an unreachable store."""


class Reports:
    """`in_background` runs a task beside others, and `on_end` is called with each job whose end was stored."""

    def __init__(
        self,
        store: JobStore,
        inbox: Inbox,
        in_background: Callable[[Awaitable[object]], None],
        on_end: Callable[[JobSnapshot], None],
    ) -> None:
        self._store = store
        self._inbox = inbox
        self._in_background = in_background
        self._on_end = on_end
        self._stuck: dict[str, str] = {}  # leases of jobs whose end could not be stored so far, and why

    @property
    def why_stuck(self) -> str | None:
        """Why the ends of some jobs can't be stored; None if there are none."""
        return next(iter(self._stuck.values()), None)

    async def run(self) -> None:
        while True:
            reports = await self._inbox.next_reports()
            latest = {report.claim.lease: report for report in reports if isinstance(report, Progress)}
            for report in reports:
                match report:
                    case Progress() if report is latest[report.claim.lease]:
                        await self._store_if_possible(report.claim, self._store.record(report))
                    case Preview():
                        await self._store_if_possible(report.claim, self._store.add_preview(report))
                    case Ending():  # in a task of its own: one that can't be stored must not hold up the others
                        self._in_background(self._store_end(report))

    async def _store_if_possible(self, claim: Claim, storing: Awaitable[None]) -> None:
        try:
            await storing
        except StoreUnavailable:
            pass  # the store counts its own errors
        except Exception:
            logger.exception("a report can't be stored", extra=log_fields(claim.job))

    async def _store_end(self, ending: Ending) -> None:
        """Store the end of a job, however often that has to be tried."""
        job, lease = ending.claim.job, ending.claim.lease
        try:
            while True:
                try:
                    snapshot = await self._store.end(ending)
                    break
                except StoreUnavailable as error:
                    if lease not in self._stuck:
                        logger.warning("the end can't be stored yet: %s", error, extra=log_fields(job))
                    self._stuck[lease] = str(error)
                    await asyncio.sleep(RETRY_S)
            if snapshot is not None:
                self._on_end(snapshot)
        except Exception:  # of this job alone, whose lease now runs out
            logger.exception("the end can't be stored", extra=log_fields(job))
        finally:
            self._stuck.pop(lease, None)
            self._inbox.settle(ending.claim)
