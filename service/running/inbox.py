"""From the worker's threads to the dispatcher's event loop."""

import asyncio

from service.jobs.store import Claim, Ending, Report


class Inbox:
    """Passes on what the worker tells, between `connect` and `disconnect`. Before and after it drops everything.

    `report` and `wake` may be called from any thread, all other methods from the event loop only.
    """

    def __init__(self) -> None:
        self.news = asyncio.Event()
        """There is a job to claim, or room for one."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._reports: asyncio.Queue[Report] = asyncio.Queue()
        self._unstored: dict[str, Claim] = {}  # by lease

    def connect(self) -> None:
        """Deliver to the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def disconnect(self) -> None:
        self._loop = None

    def report(self, report: Report) -> None:
        if (loop := self._loop) is not None:
            loop.call_soon_threadsafe(self._receive, report)

    def wake(self) -> None:
        if (loop := self._loop) is not None:
            loop.call_soon_threadsafe(self.news.set)

    async def next_reports(self) -> list[Report]:
        """Wait for a report; all reports that have arrived, in their order."""
        reports = [await self._reports.get()]
        while not self._reports.empty():
            reports.append(self._reports.get_nowait())
        return reports

    @property
    def unstored(self) -> list[Claim]:
        """Jobs whose worker has reported their end, and whose end is not stored yet."""
        return list(self._unstored.values())

    def settle(self, claim: Claim) -> None:
        """The end of this job is stored."""
        self._unstored.pop(claim.lease, None)
        self.news.set()

    def _receive(self, report: Report) -> None:
        if isinstance(report, Ending):
            self._unstored[report.claim.lease] = report.claim
        self._reports.put_nowait(report)
