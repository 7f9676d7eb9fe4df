"""Jobs in this process's memory, shared by the event loop and the worker's threads."""

from bisect import insort
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from itertools import count
from threading import Lock

from service.errors import JobNotFinished, JobNotFound
from service.jobs.job import Failure, Job, JobStatus, Outcome, Priority, Receipt
from service.jobs.results import MemoryResults

_RANKS = {priority: rank for rank, priority in enumerate(Priority)}


class MemoryStore:
    """Every method is atomic. Ended jobs are forgotten `job_ttl_s` after their end."""

    def __init__(self, results: MemoryResults, *, job_ttl_s: float, clock: Callable[[], float]) -> None:
        self._results = results
        self._job_ttl_s = job_ttl_s
        self._clock = clock
        self._lock = Lock()
        self._jobs: dict[str, Job] = {}
        self._queue: list[tuple[int, int, str]] = []  # (priority's rank, arrival, job id)
        self._arrivals = count()
        self._outcomes: dict[str, Future[Outcome]] = {}  # of jobs that have not ended
        self._ended: dict[str, float] = {}  # when to forget a job, in the order of their ends

    def add(self, job: Job) -> Future[Outcome]:
        """Queue a job. The future is done when the job has ended, however it ended."""
        with self._lock:
            self._forget_old()
            self._jobs[job.id] = job
            insort(self._queue, (_RANKS[job.priority], next(self._arrivals), job.id))
            outcome: Future[Outcome] = Future()
            self._outcomes[job.id] = outcome
            return outcome

    def get(self, job_id: str) -> Job:
        with self._lock:
            self._forget_old()
            if job_id not in self._jobs:
                raise JobNotFound(f"there is no job '{job_id}'")
            return self._jobs[job_id]

    def content(self, job_id: str) -> Outcome:
        """A succeeded job's pictures. Raises JobNotFound, JobNotFinished, ResultExpired."""
        job = self.get(job_id)
        if job.status is not JobStatus.SUCCEEDED:
            raise JobNotFinished(f"job {job_id} is {job.status}; only a succeeded job has content")
        with self._lock:
            return Outcome(job, self._results.get(job_id))

    def claim(self, fits: Callable[[Job], bool]) -> Job | None:
        """The first waiting job that `fits`, now running: by priority, then by arrival."""
        with self._lock:
            for entry in self._queue:
                job = self._jobs[entry[2]]
                if fits(job):
                    self._queue.remove(entry)
                    self._jobs[job.id] = replace(job.moved_to(JobStatus.RUNNING), started_at=self._clock())
                    return self._jobs[job.id]
            return None

    def record_step(self, job_id: str) -> None:
        """One of a running job's pictures took one more step. A job that has ended keeps the count it ended with."""
        with self._lock:
            if job_id in self._outcomes:
                job = self._jobs[job_id]
                self._jobs[job_id] = replace(job, steps_done=job.steps_done + 1)

    def end(
        self,
        job_id: str,
        status: JobStatus,
        *,
        failure: Failure | None = None,
        receipts: tuple[Receipt, ...] = (),
        pictures: tuple[bytes, ...] = (),
    ) -> Job | None:
        """The job, ended with `status`; None if it had already ended, since whoever ends it first has decided."""
        with self._lock:
            if job_id not in self._outcomes:
                return None
            now = self._clock()
            job = replace(self._jobs[job_id].moved_to(status), failure=failure, receipts=receipts, ended_at=now)
            self._jobs[job_id] = job
            self._queue = [entry for entry in self._queue if entry[2] != job_id]
            self._ended[job_id] = now + self._job_ttl_s
            if status is JobStatus.SUCCEEDED:
                self._results.put(job_id, pictures)
            outcome = self._outcomes.pop(job_id)
        # Outside the lock: this runs the waiting side's callbacks.
        if outcome.set_running_or_notify_cancel():
            outcome.set_result(Outcome(job, pictures))
        return job

    def is_live(self, job_id: str) -> bool:
        with self._lock:
            return job_id in self._outcomes

    def live_jobs(self) -> list[Job]:
        """Queued and running jobs."""
        with self._lock:
            return [self._jobs[job_id] for job_id in self._outcomes]

    def backlog_s(self) -> float:
        """Predicted seconds of work in all queued and running jobs."""
        return sum(job.remaining_seconds for job in self.live_jobs())

    def load(self) -> Counter[tuple[str, JobStatus]]:
        """How many jobs of each model are queued and running."""
        return Counter((job.model, job.status) for job in self.live_jobs())

    def _forget_old(self) -> None:
        now = self._clock()
        for job_id, forget_at in list(self._ended.items()):
            if forget_at > now:
                break
            del self._ended[job_id], self._jobs[job_id]
