"""How jobs end: results are decoded, files encoded, and whoever asked for them is told."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from models.errors import EmptySurface, GenerationError, InvalidRequest
from models.file_formats import MeshFormat, OutputFormat
from models.mesh.cleanup import CleanMesh
from models.report import GenerationSummary
from service.jobs.job import Failure, FailureReason, JobStatus, Receipt, StageSeconds, log_fields
from service.jobs.store import Claim, Ending, Preview, Progress
from service.metrics import Metrics
from service.running.output import encode_output

logger = logging.getLogger(__name__)

Report = Progress | Preview | Ending
"""What a worker tells of the jobs that it holds."""


@dataclass(frozen=True, slots=True)
class Denoised:
    """A picture or mesh of a job, number `index`, after its last step. `decode` gives it; any thread may call it."""

    claim: Claim
    index: int
    decode: Callable[[], NDArray[np.uint8] | CleanMesh]
    summary: GenerationSummary
    queue_s: float
    encode_s: float
    denoise_s: float
    batch_size_mean: float


@dataclass(frozen=True, slots=True)
class Sketched:
    """The same before its last step: what it will be as far as `decode` can tell, number `number` of such."""

    claim: Claim
    index: int
    number: int
    decode: Callable[[], NDArray[np.uint8] | CleanMesh]


class _EndedAlready(Exception):
    """Nobody waits for this result any more."""


class Publisher:
    """Used by the worker's thread. What it makes it hands to `report`; `is_wanted` says whether to make it still.

    Decoding and encoding run in a thread for each model: most of a mesh's time is its decoding, and neither the next
    steps nor the pictures of another model wait for it. diffusers' AutoencoderKLQwenImage could not do two at once.
    """

    def __init__(
        self,
        metrics: Metrics,
        report: Callable[[Report], None],
        is_wanted: Callable[[Claim], bool],
        *,
        clock: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._report = report
        self._is_wanted = is_wanted
        self._clock = clock
        self._pools: defaultdict[str, ThreadPoolExecutor] = defaultdict(
            partial(ThreadPoolExecutor, 1, thread_name_prefix="publisher")
        )
        self._files: dict[str, dict[int, Future[tuple[bytes, Receipt]]]] = {}  # by lease
        self._claims: dict[str, Claim] = {}
        self._finish_s: dict[str, float] = {}
        self._unfinished: list[Future[tuple[bytes, Receipt]]] = []

    def publish(self, denoised: Denoised, on_file: Callable[[], None]) -> None:
        """Make a result's file, then call `on_file` in some thread; the last one of a job also ends the job."""
        claim, job = denoised.claim, denoised.claim.job
        self._metrics.observe_stage(job.model, "denoise", denoised.denoise_s)
        file = self._pools[job.model].submit(self._make_file, denoised)
        file.add_done_callback(lambda _: on_file())
        self._unfinished = [*(file for file in self._unfinished if not file.done()), file]
        self._claims[claim.lease] = claim
        files = self._files.setdefault(claim.lease, {})
        files[denoised.index] = file
        if len(files) == len(job.requests):
            self._forget(claim.lease)
            # After the job's files in the thread's queue, so that it waits for nothing.
            self._pools[job.model].submit(self._succeed, claim, [files[index] for index in sorted(files)])

    def sketch(self, sketched: Sketched) -> None:
        """Make a preview's file, unless the job ends before its turn."""
        self._pools[sketched.claim.job.model].submit(self._make_preview, sketched)

    @property
    def num_unfinished(self) -> int:
        """Results that are not files yet: their latents are still in memory. Any thread may ask."""
        return sum(not file.done() for file in self._unfinished)

    def finish_seconds(self, model: str) -> float:
        """What decoding and encoding took of the model's last result; 0 before the first. Any thread may ask."""
        return self._finish_s.get(model, 0.0)

    def drop_unwanted(self) -> None:
        """Let go of the files of jobs that ended before their last picture."""
        for lease, claim in list(self._claims.items()):
            if not self._is_wanted(claim):
                self._forget(lease)

    def fail(self, claim: Claim, error: Exception) -> None:
        """End a job because of `error`. What only our log may know is not told to the client."""
        job = claim.job
        match error:
            case InvalidRequest():
                failure = Failure(FailureReason.INVALID_REQUEST, str(error), error.param)
            case GenerationError():
                failure = Failure(FailureReason.GENERATION_FAILED, f"job {job.id} failed: {error}")
            case _:
                failure = Failure(FailureReason.GENERATION_FAILED, f"job {job.id} failed while generating")
        if failure.reason is FailureReason.GENERATION_FAILED:
            logger.error("generation failed", exc_info=error, extra=log_fields(job))
        self._report(Ending(claim, JobStatus.FAILED, failure=failure))

    def close(self) -> None:
        """Return when everything that was published has ended."""
        for pool in self._pools.values():
            pool.shutdown()

    def _forget(self, lease: str) -> None:
        self._claims.pop(lease, None)
        self._files.pop(lease, None)

    def _make_file(self, denoised: Denoised) -> tuple[bytes, Receipt]:
        job = denoised.claim.job
        if not self._is_wanted(denoised.claim):
            raise _EndedAlready
        began = time.perf_counter()
        result = denoised.decode()
        decoded = time.perf_counter()
        data = encode_output(result, job.requests[denoised.index], job.output)
        self._metrics.observe_stage(job.model, "decode", decoded - began)
        self._metrics.observe_stage(job.model, "output", time.perf_counter() - decoded)
        total_s = self._clock() - job.created_at
        seconds = StageSeconds(
            queue=denoised.queue_s,
            encode=denoised.encode_s,
            denoise=denoised.denoise_s,
            decode=decoded - began,
            total=total_s,
        )
        self._finish_s[job.model] = time.perf_counter() - began
        receipt = Receipt(
            denoised.summary,
            job.quality_requested,
            seconds,
            denoised.batch_size_mean,
            mesh=result.report if isinstance(result, CleanMesh) else None,
            is_degraded=job.is_degraded,
            deadline_met=None if job.deadline_at is None else job.created_at + total_s <= job.deadline_at,
        )
        return data, receipt

    def _make_preview(self, sketched: Sketched) -> None:
        """What can't be shown yet is not: a preview is no promise."""
        job = sketched.claim.job
        if not self._is_wanted(sketched.claim):
            return
        try:
            result = sketched.decode()
            # In the format that shows it best, whatever the result's: no metadata, no loss.
            output_format = MeshFormat.GLB if isinstance(result, CleanMesh) else OutputFormat.PNG
            output = replace(job.output, format=output_format, compression_quality=None, has_metadata=False)
            file = encode_output(result, job.requests[sketched.index], output)
        except EmptySurface as error:
            logger.info("no preview yet: %s", error, extra=log_fields(job))
        except Exception:
            logger.exception("a preview failed", extra=log_fields(job))
        else:
            self._report(Preview(sketched.claim, sketched.index, sketched.number, file))

    def _succeed(self, claim: Claim, files: list[Future[tuple[bytes, Receipt]]]) -> None:
        try:
            pictures, receipts = zip(*(file.result() for file in files), strict=True)
        except _EndedAlready:
            return
        except Exception as error:
            self.fail(claim, error)
            return
        self._report(Ending(claim, JobStatus.SUCCEEDED, receipts=receipts, files=pictures))
