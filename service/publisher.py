"""How jobs end: files are encoded, and the store, the metrics and the log are told."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import GenerationError, InvalidRequest
from models.report import GenerationSummary
from service.jobs.job import Failure, FailureReason, Job, JobStatus, Receipt, StageSeconds
from service.jobs.memory import MemoryStore
from service.metrics import Metrics
from service.output import encode_output

logger = logging.getLogger(__name__)

NUM_ENCODER_THREADS = 2


@dataclass(frozen=True, slots=True)
class DecodedPicture:
    """One picture of a job, number `index`, as the engine gave it: `(height, width, 3)` uint8."""

    job: Job
    index: int
    pixels: NDArray[np.uint8]
    summary: GenerationSummary
    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float
    batch_size_mean: float


class Publisher:
    """Used by the worker's thread, except for `end` and `fail_everything_left`, which any thread may call.

    Encoding runs in a small pool of threads, so that the device does not wait for PNG compression.
    """

    def __init__(self, store: MemoryStore, metrics: Metrics, *, clock: Callable[[], float]) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._pool = ThreadPoolExecutor(NUM_ENCODER_THREADS, thread_name_prefix="encoder")
        self._files: dict[str, dict[int, Future[tuple[bytes, Receipt]]]] = {}

    def publish(self, picture: DecodedPicture) -> None:
        """Encode a picture; the last one of a job also ends the job."""
        job = picture.job
        self._metrics.observe_stage(job.model, "denoise", picture.denoise_s)
        self._metrics.observe_stage(job.model, "decode", picture.decode_s)
        files = self._files.setdefault(job.id, {})
        files[picture.index] = self._pool.submit(self._encode, picture)
        if len(files) == len(job.requests):
            del self._files[job.id]
            # After the job's files in the pool's queue, so that it waits only for what has already begun.
            self._pool.submit(self._succeed, job, [files[index] for index in sorted(files)])

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
        self._pool.shutdown()

    def _encode(self, picture: DecodedPicture) -> tuple[bytes, Receipt]:
        job, began = picture.job, time.perf_counter()
        data = encode_output(picture.pixels, job.requests[picture.index], job.output)
        self._metrics.observe_stage(job.model, "output", time.perf_counter() - began)
        seconds = StageSeconds(
            queue=picture.queue_s,
            encode=picture.encode_s,
            denoise=picture.denoise_s,
            decode=picture.decode_s,
            total=self._clock() - job.created_at,
        )
        return data, Receipt(picture.summary, job.quality_requested, seconds, picture.batch_size_mean)

    def _succeed(self, job: Job, files: list[Future[tuple[bytes, Receipt]]]) -> None:
        try:
            pictures, receipts = zip(*(file.result() for file in files), strict=True)
        except Exception as error:
            self.fail(job, error)
            return
        self.end(job.id, JobStatus.SUCCEEDED, receipts=receipts, pictures=pictures)
