from collections.abc import Callable

import pytest

from service.errors import JobNotFinished, JobNotFound, ResultExpired
from service.jobs.job import Failure, FailureReason, Job, JobStatus, Priority
from service.jobs.memory import MemoryStore
from service.jobs.results import MemoryResults


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def memory_store(clock: Clock) -> MemoryStore:
    return MemoryStore(MemoryResults(ttl_s=10, max_bytes=1000, clock=clock), job_ttl_s=100, clock=clock)


def test_claims_go_by_priority_then_by_arrival(memory_store: MemoryStore, make_job: Callable[..., Job]) -> None:
    for name, priority in (("a", "low"), ("b", "normal"), ("c", "high"), ("d", "normal"), ("e", "high")):
        memory_store.add(make_job(name, priority=Priority(priority)))
    claimed = []
    while job := memory_store.claim(lambda job: True):
        assert job.status is JobStatus.RUNNING
        claimed.append(job.id)
    assert claimed == ["c", "e", "b", "d", "a"]


def test_claim_passes_over_what_does_not_fit(memory_store: MemoryStore, make_job: Callable[..., Job]) -> None:
    memory_store.add(make_job("a"))
    memory_store.add(make_job("b"))
    claimed = memory_store.claim(lambda job: job.id == "b")
    assert claimed is not None
    assert claimed.id == "b"
    assert memory_store.claim(lambda job: False) is None
    assert memory_store.get("a").status is JobStatus.QUEUED


def test_whoever_waits_gets_the_pictures(memory_store: MemoryStore, make_job: Callable[..., Job]) -> None:
    ended = memory_store.add(make_job("a"))
    memory_store.claim(lambda job: True)
    assert not ended.done()
    memory_store.end("a", JobStatus.SUCCEEDED, pictures=(b"picture",))
    assert ended.result(timeout=0).pictures == (b"picture",)
    assert memory_store.content("a").pictures == (b"picture",)


def test_first_end_decides(memory_store: MemoryStore, make_job: Callable[..., Job]) -> None:
    ended = memory_store.add(make_job("a"))
    memory_store.claim(lambda job: True)
    memory_store.end("a", JobStatus.CANCELLED)
    assert memory_store.end("a", JobStatus.SUCCEEDED, pictures=(b"late",)) is None
    memory_store.record_step("a")
    assert memory_store.get("a").status is JobStatus.CANCELLED
    assert memory_store.get("a").steps_done == 0
    assert ended.result(timeout=0).pictures == ()


def test_cancelled_job_leaves_the_queue(memory_store: MemoryStore, make_job: Callable[..., Job]) -> None:
    memory_store.add(make_job("a"))
    memory_store.end("a", JobStatus.CANCELLED)
    assert memory_store.claim(lambda job: True) is None
    assert memory_store.live_jobs() == []


def test_waiting_side_may_have_gone(memory_store: MemoryStore, make_job: Callable[..., Job]) -> None:
    memory_store.add(make_job("a")).cancel()
    assert memory_store.end("a", JobStatus.CANCELLED) is not None


def test_content_needs_success(memory_store: MemoryStore, make_job: Callable[..., Job]) -> None:
    with pytest.raises(JobNotFound, match="'a'"):
        memory_store.content("a")
    memory_store.add(make_job("a"))
    with pytest.raises(JobNotFinished, match="queued"):
        memory_store.content("a")
    memory_store.end("a", JobStatus.FAILED, failure=Failure(FailureReason.GENERATION_FAILED, "broken"))
    with pytest.raises(JobNotFinished, match="failed"):
        memory_store.content("a")


def test_content_expires_before_the_record(
    memory_store: MemoryStore, clock: Clock, make_job: Callable[..., Job]
) -> None:
    memory_store.add(make_job("a"))
    memory_store.claim(lambda job: True)
    memory_store.end("a", JobStatus.SUCCEEDED, pictures=(b"picture",))
    clock.now = 50
    with pytest.raises(ResultExpired):
        memory_store.content("a")
    assert memory_store.get("a").status is JobStatus.SUCCEEDED
    clock.now = 100
    with pytest.raises(JobNotFound):
        memory_store.get("a")


def test_backlog_counts_the_steps_that_are_left(memory_store: MemoryStore, make_job: Callable[..., Job]) -> None:
    memory_store.add(make_job("a"))
    memory_store.add(make_job("b"))
    assert memory_store.backlog_s() == 4.0
    memory_store.claim(lambda job: job.id == "a")
    memory_store.record_step("a")
    assert memory_store.backlog_s() == 3.5
    assert memory_store.load() == {("drawn", JobStatus.RUNNING): 1, ("drawn", JobStatus.QUEUED): 1}
    memory_store.end("a", JobStatus.CANCELLED)
    assert memory_store.backlog_s() == 2.0
