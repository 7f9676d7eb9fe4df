from collections.abc import Callable

import pytest

from service.jobs.job import Failure, FailureReason, Job, JobStatus
from service.jobs.store import Claim, Ending, Progress
from service.running.inbox import Inbox

pytestmark = pytest.mark.anyio

MakeJob = Callable[..., Job]


async def test_reports_and_news_without_a_listener_are_dropped(make_job: MakeJob) -> None:
    inbox, claim = Inbox(), Claim(make_job("a"), "lease")
    ending = Ending(claim, JobStatus.FAILED, failure=Failure(FailureReason.GENERATION_FAILED, "broken"))
    inbox.wake()
    inbox.report(ending)
    inbox.connect()
    inbox.report(Progress(claim, 1, 4, 1.0, 1.0))
    assert [type(report) for report in await inbox.next_reports()] == [Progress]
    assert not inbox.news.is_set()
    assert inbox.unstored == []


async def test_ended_job_is_unstored_until_it_is_settled(make_job: MakeJob) -> None:
    inbox, claim = Inbox(), Claim(make_job("a"), "lease")
    inbox.connect()
    progress = Progress(claim, 1, 4, 1.0, 1.0)
    ending = Ending(claim, JobStatus.FAILED, failure=Failure(FailureReason.GENERATION_FAILED, "broken"))
    inbox.report(progress)
    inbox.report(ending)
    reports = await inbox.next_reports()
    while ending not in reports:
        reports += await inbox.next_reports()
    assert reports == [progress, ending]
    assert inbox.unstored == [claim]
    inbox.settle(claim)
    assert inbox.unstored == []
