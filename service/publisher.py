"""How jobs end: results are decoded, files encoded, and the store, the metrics and the log are told."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from models.errors import GenerationError, InvalidRequest
from models.mesh.cleanup import CleanMesh
from models.report import GenerationSummary
from service.jobs.job import Failure, FailureReason, Job, JobStatus, Receipt, StageSeconds
from service.jobs.memory import MemoryStore
from service.metrics import Metrics
from service.output import encode_output

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Denoised:
    """A picture or mesh of a job, number `index`, after its last step. `decode` gives it; any thread may call it."""

    job: Job
    index: int
    decode: Callable[[], NDArray[np.uint8] | CleanMesh]
    summary: GenerationSummary
    queue_s: float
    encode_s: float
    denoise_s: float
    batch_size_mean: float


class _EndedAlready(Exception):
    """Nobody waits for this result any more."""


class Publisher:
    """Used by the worker's thread, except for `end` and `fail_everything_left`, which any thread may call.

    Decoding and encoding run in a thread for each model: most of a mesh's time is its decoding, and neither the next
    steps nor the pictures of another model wait for it. diffusers' AutoencoderKLQwenImage could not do two at once.
    """

    def __init__(self, store: MemoryStore, metrics: Metrics, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._pools: defaultdict[str, ThreadPoolExecutor] = defaultdict(
            partial(ThreadPoolExecutor, 1, thread_name_prefix="publisher")
        )
        self._files: dict[str, dict[int, Future[tuple[bytes, Receipt]]]] = {}
        self._unfinished: list[Future[tuple[bytes, Receipt]]] = []

    def publish(self, denoised: Denoised, on_file: Callable[[], None]) -> None:
        """Make a result's file, then call `on_file` in some thread; the last one of a job also ends the job."""
        job = denoised.job
        self._metrics.observe_stage(job.model, "denoise", denoised.denoise_s)
        file = self._pools[job.model].submit(self._make_file, denoised)
        file.add_done_callback(lambda _: on_file())
        self._unfinished.append(file)
        files = self._files.setdefault(job.id, {})
        files[denoised.index] = file
        if len(files) == len(job.requests):
            del self._files[job.id]
            # After the job's files in the thread's queue, so that it waits for nothing.
            self._pools[job.model].submit(self._succeed, job, [files[index] for index in sorted(files)])

    @property
    def num_unfinished(self) -> int:
        """Results that are not files yet: their latents are still in memory."""
        self._unfinished = [file for file in self._unfinished if not file.done()]
        return len(self._unfinished)

    def drop_ended(self) -> None:
        """Let go of the files of jobs that ended before their last picture."""
        self._files = {job_id: files for job_id, files in self._files.items() if self._store.is_live(job_id)}

    def fail(self, job: Job, error: Exception) -> None:
        """End `job` because of `error`. What only our log may know is not told to the client."""
        match error:
            case InvalidRequest():
                failure = Failure(FailureReason.INVALID_REQUEST, str(error), error.param)
            case GenerationError():
                failure = Failure(FailureReason.GENERATION_FAILED, f"job {job.id} failed: {error}")
            case _:
                failure = Failure(FailureReason.GENERATION_FAILED, f"job {job.id} failed while generating")
        if failure.reason is FailureReason.GENERATION_FAILED:
            logger.error("generation failed job_id=%s", job.id, exc_info=error)
        self.end(job.id, JobStatus.FAILED, failure=failure)

    def fail_everything_left(self) -> None:
        """End all queued and running jobs, since the server shuts down."""
        for job in self._store.live_jobs():
            failure = Failure(FailureReason.DRAINING, f"the server shut down before job {job.id} was finished")
            self.end(job.id, JobStatus.FAILED, failure=failure)

    def end(
        self,
        job_id: str,
        status: JobStatus,
        *,
        failure: Failure | None = None,
        receipts: tuple[Receipt, ...] = (),
        pictures: tuple[bytes, ...] = (),
    ) -> None:
        """End a job, unless it has ended already."""
        job = self._store.end(job_id, status, failure=failure, receipts=receipts, pictures=pictures)
        if job is None:
            return
        self._metrics.observe_end(job)
        logger.info(
            "job ended job_id=%s request_id=%s model=%s pictures=%d status=%s seconds=%.3f",
            *(job.id, job.request_id, job.model, len(job.requests), status, self._clock() - job.created_at),
        )

    def close(self) -> None:
        """Return when everything that was published has ended."""
        for pool in self._pools.values():
            pool.shutdown()

    def _make_file(self, denoised: Denoised) -> tuple[bytes, Receipt]:
        job = denoised.job
        if not self._store.is_live(job.id):
            raise _EndedAlready
        began = time.perf_counter()
        result = denoised.decode()
        decoded = time.perf_counter()
        data = encode_output(result, job.requests[denoised.index], job.output)
        self._metrics.observe_stage(job.model, "decode", decoded - began)
        self._metrics.observe_stage(job.model, "output", time.perf_counter() - decoded)
        seconds = StageSeconds(
            queue=denoised.queue_s,
            encode=denoised.encode_s,
            denoise=denoised.denoise_s,
            decode=decoded - began,
            total=self._clock() - job.created_at,
        )
        mesh = result.report if isinstance(result, CleanMesh) else None
        return data, Receipt(denoised.summary, job.quality_requested, seconds, denoised.batch_size_mean, mesh)

    def _succeed(self, job: Job, files: list[Future[tuple[bytes, Receipt]]]) -> None:
        try:
            pictures, receipts = zip(*(file.result() for file in files), strict=True)
        except _EndedAlready:
            return
        except Exception as error:
            self.fail(job, error)
            return
        self.end(job.id, JobStatus.SUCCEEDED, receipts=receipts, pictures=pictures)
