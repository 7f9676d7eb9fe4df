"""How jobs end: results are decoded and encoded as artifacts, and the ends are reported."""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.card import ModelCard
from models.errors import DeviceLost, EmptySurface, GenerationError, InvalidRequest, OutOfDeviceMemory
from models.file_formats import MeshFormat, OutputFormat
from models.memory import NO_MEMORY, RequestMemory
from models.mesh.cleanup import CleanMesh
from models.mesh.file import MeshFile, make_mesh_file
from models.mesh.size import surface_bytes
from models.mesh.surface import FieldSamples
from models.report import GenerationSummary
from models.request import MeshRequest
from service.errors import SandboxFailed
from service.jobs.job import Failure, FailureReason, JobStatus, Receipt, StageSeconds, log_fields
from service.jobs.store import Claim, Ending, Preview, Report
from service.metrics import Metrics
from service.running.device_use import DeviceUse
from service.running.output import encode_output
from service.running.priority_thread import PriorityThread
from service.running.sandbox import NotWanted, Sandbox
from service.scheduling.cost import relative_size
from service.scheduling.memory import Decoding, try_smaller
from service.scheduling.pace import Peak

logger = logging.getLogger(__name__)

_FALL = 0.2
"""How fast `Publisher.finish_seconds` falls, see `Peak`."""

Decoded = NDArray[np.uint8] | CleanMesh | FieldSamples
"""Pixels, a mesh, or a field, which still has to become a mesh."""


@dataclass(frozen=True, slots=True)
class Denoised:
    """The result of request `index` of a job after its last step. `decode` may be called in any thread.

    `field_s` is the time since the last step, in which a mesh's field was decoded. `memory` is what the result still
    takes of the device.
    """

    claim: Claim
    index: int
    decode: Callable[[], Decoded]
    summary: GenerationSummary
    queue_s: float
    encode_s: float
    denoise_s: float
    field_s: float
    batch_size_mean: float
    memory: RequestMemory = NO_MEMORY


@dataclass(frozen=True, slots=True)
class PendingPreview:
    """Preview `number` of the unfinished result of request `index`, before it is decoded and encoded.

    Decoding it takes `peak_bytes` of the device.
    """

    claim: Claim
    index: int
    number: int
    decode: Callable[[], NDArray[np.uint8] | CleanMesh]
    peak_bytes: int = 0


class _Use(NamedTuple):
    """What `work` of a model's thread takes of the device until it is done."""

    work: Future[Any]
    model: str
    held: int
    peak: int


_Encoded = Future[tuple[bytes, Receipt]]
"""An artifact with its receipt, or why there is none."""


class Publisher:
    """Used by the worker's thread. It reports previews and ends to `report`; `is_wanted` says if a claim still holds.

    A job whose decoding finds the device lost does not end; `on_device_lost` is told, in some thread. `cards` are those
    of all loaded models.

    Decoding and encoding run in one thread for each model: most of a mesh's time is its decoding, and neither the next
    steps nor the artifacts of another model wait for it. diffusers' AutoencoderKLQwenImage cannot decode in two threads
    at once. A field becomes a mesh in a process beside the model's thread: that work would hold the interpreter's lock
    for seconds, could not be cancelled, and takes gigabytes at high resolutions.
    """

    def __init__(
        self,
        metrics: Metrics,
        report: Callable[[Report], None],
        is_wanted: Callable[[Claim], bool],
        *,
        device: DeviceUse,
        on_device_lost: Callable[[DeviceLost], None],
        clock: Callable[[], float],
    ) -> None:
        self._device = device
        self._on_device_lost = on_device_lost
        self.cards: Mapping[str, ModelCard] = {}
        self._metrics = metrics
        self._report = report
        self._is_wanted = is_wanted
        self._clock = clock
        self._threads: defaultdict[str, PriorityThread] = defaultdict(partial(PriorityThread, "publisher"))
        self._sandboxes: defaultdict[str, Sandbox] = defaultdict(Sandbox)
        self._artifacts: dict[str, dict[int, _Encoded]] = {}  # lease -> index of the request -> artifact
        self._claims: dict[str, Claim] = {}
        self._finish: defaultdict[str, Peak] = defaultdict(lambda: Peak(_FALL))
        self._unfinished: list[_Encoded] = []
        self._uses: list[_Use] = []

    def publish(self, denoised: Denoised, on_artifact: Callable[[], None]) -> None:
        """Decode and encode a result, then call `on_artifact` in some thread. The last result of a job ends the job."""
        claim, job = denoised.claim, denoised.claim.job
        self._metrics.observe_stage(job.model, "denoise", denoised.denoise_s)
        artifact = self._threads[job.model].submit(job.is_urgent, self._make_artifact, denoised)
        memory = denoised.memory
        self._note_use(_Use(artifact, job.model, memory.finished + memory.grid, memory.decode))
        artifact.add_done_callback(lambda _: on_artifact())
        self._unfinished = [*(other for other in self._unfinished if not other.done()), artifact]
        self._claims[claim.lease] = claim
        artifacts = self._artifacts.setdefault(claim.lease, {})
        artifacts[denoised.index] = artifact
        if len(artifacts) == len(job.requests):
            self._forget(claim.lease)
            # Queued behind the job's artifacts in the same thread, so it never blocks on them.
            encoded = [artifacts[index] for index in sorted(artifacts)]
            self._threads[job.model].submit(job.is_urgent, self._succeed, claim, encoded)

    def preview(self, pending: PendingPreview, on_preview: Callable[[], None]) -> None:
        """Decode, encode and report a preview, unless the job ends first; then call `on_preview` in some thread."""
        job = pending.claim.job
        made = self._threads[job.model].submit(job.is_urgent, self._make_preview, pending)
        self._note_use(_Use(made, job.model, 0, pending.peak_bytes))
        made.add_done_callback(lambda _: on_preview())

    def _note_use(self, use: _Use) -> None:
        self._uses = [*(other for other in self._uses if not other.work.done()), use]

    @property
    def decoding(self) -> Decoding:
        """What its threads take of the device, with all that they still have to do. Any thread may ask."""
        uses = [use for use in self._uses if not use.work.done()]
        peaks: dict[str, int] = {}
        for use in uses:
            peaks[use.model] = max(peaks.get(use.model, 0), use.peak)
        return Decoding(sum(use.held for use in uses), peaks)

    @property
    def num_unfinished(self) -> int:
        """Results that are not encoded yet: their latents are still in memory. Any thread may ask."""
        return sum(not artifact.done() for artifact in self._unfinished)

    def finish_seconds(self, model: str) -> float:
        """How long decoding and encoding takes lately at the model's default size; 0 before the first result.

        It is 0 for meshes, whose time is predicted from their resolution. Any thread may ask.
        """
        return self._finish[model].seconds

    def drop_unwanted(self) -> None:
        """Forget the artifacts of jobs that ended before their last result."""
        for lease, claim in list(self._claims.items()):
            if not self._is_wanted(claim):
                self._forget(lease)

    def fail(self, claim: Claim, error: Exception) -> None:
        """End a job because of `error`. Details of unexpected errors go to the log only, not to the client."""
        job = claim.job
        match error:
            case InvalidRequest():
                failure = Failure(FailureReason.INVALID_REQUEST, str(error), error.param)
            case OutOfDeviceMemory():
                hint = try_smaller(job.requests[0], self.cards[job.model])
                failure = Failure(FailureReason.GENERATION_FAILED, f"job {job.id} failed: {error}{hint}")
            case GenerationError() | SandboxFailed():
                failure = Failure(FailureReason.GENERATION_FAILED, f"job {job.id} failed: {error}")
            case _:
                failure = Failure(FailureReason.GENERATION_FAILED, f"job {job.id} failed while generating")
        if failure.reason is FailureReason.GENERATION_FAILED:
            logger.error("generation failed", exc_info=error, extra=log_fields(job))
        self._report(Ending(claim, JobStatus.FAILED, failure=failure))

    def close(self) -> None:
        """Return when all decoding and encoding has ended."""
        for thread in self._threads.values():
            thread.close()
        for sandbox in self._sandboxes.values():
            sandbox.close()

    def _forget(self, lease: str) -> None:
        self._claims.pop(lease, None)
        self._artifacts.pop(lease, None)

    def _make_artifact(self, denoised: Denoised) -> tuple[bytes, Receipt]:
        job = denoised.claim.job
        if not self._is_wanted(denoised.claim):
            raise NotWanted
        began = time.perf_counter()
        result = self._decoded(denoised)
        decoded = time.perf_counter()
        decode_s = denoised.field_s + decoded - began
        request = job.requests[denoised.index]
        data = result.data if isinstance(result, MeshFile) else encode_output(result, request, job.output)
        self._metrics.observe_stage(job.model, "decode", decode_s)
        self._metrics.observe_stage(job.model, "output", time.perf_counter() - decoded)
        total_s = self._clock() - job.created_at
        seconds = StageSeconds(
            queue=denoised.queue_s,
            encode=denoised.encode_s,
            denoise=denoised.denoise_s,
            decode=decode_s,
            total=total_s,
        )
        card = self.cards.get(job.model)  # None if the model was unloaded, once this job was cancelled
        if card is not None and not isinstance(result, MeshFile):
            self._finish[job.model].observe((time.perf_counter() - began) / relative_size(request, card))
        receipt = Receipt(
            denoised.summary,
            job.quality_requested,
            seconds,
            denoised.batch_size_mean,
            mesh=result.report if isinstance(result, CleanMesh | MeshFile) else None,
            is_degraded=job.is_degraded,
            deadline_met=None if job.deadline_at is None else job.created_at + total_s <= job.deadline_at,
        )
        return data, receipt.with_packed_trace()

    def _decoded(self, denoised: Denoised) -> NDArray[np.uint8] | CleanMesh | MeshFile:
        """Pixels, a mesh, or the file of a mesh that was made in a process of its own."""
        try:
            result, job = self._device.call(denoised.decode), denoised.claim.job
        except DeviceLost as error:
            self._on_device_lost(error)
            raise
        if not isinstance(result, FieldSamples):
            return result
        request = job.requests[denoised.index]
        assert isinstance(request, MeshRequest)
        assert isinstance(job.output.format, MeshFormat)
        try:
            return self._sandboxes[job.model].run(
                make_mesh_file,
                result,
                request.target_faces,
                job.output.format,
                max_bytes=surface_bytes(request.octree_resolution),
                is_wanted=partial(self._is_wanted, denoised.claim),
            )
        except SandboxFailed as error:
            cells = request.octree_resolution
            raise SandboxFailed(f"{error}; try an octree_resolution of less than {cells}") from error

    def _make_preview(self, pending: PendingPreview) -> None:
        """A preview that fails is left out: no client relies on it."""
        job = pending.claim.job
        if not self._is_wanted(pending.claim):
            return
        try:
            with self._device.shared():
                result = pending.decode()
            # Previews are lossless and without metadata, in one format whatever the format of the result.
            output_format = MeshFormat.GLB if isinstance(result, CleanMesh) else OutputFormat.PNG
            output = replace(job.output, format=output_format, compression_quality=None, has_metadata=False)
            file = encode_output(result, job.requests[pending.index], output)
        except EmptySurface as error:
            logger.info("no preview yet: %s", error, extra=log_fields(job))
        except OutOfDeviceMemory as error:
            logger.warning("no preview: %s", error, extra=log_fields(job))
        except DeviceLost as error:
            self._on_device_lost(error)
        except Exception:
            logger.exception("a preview failed", extra=log_fields(job))
        else:
            self._report(Preview(pending.claim, pending.index, pending.number, file, self._clock()))

    def _succeed(self, claim: Claim, encoded: list[_Encoded]) -> None:
        try:
            artifacts, receipts = zip(*(artifact.result() for artifact in encoded), strict=True)
        except (NotWanted, DeviceLost):
            return
        except Exception as error:
            self.fail(claim, error)
            return
        self._report(Ending(claim, JobStatus.SUCCEEDED, receipts=receipts, artifacts=artifacts))
