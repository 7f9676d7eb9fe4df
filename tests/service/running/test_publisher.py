"""The publisher with real images and threads, and a list in place of a dispatcher."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from threading import Event
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.card import ImageCard
from models.errors import DeviceLost, EmptySurface, GenerationError, InvalidRequest
from models.file_formats import OutputFormat
from models.report import GenerationSummary
from models.request import ImageRequest
from service.jobs.job import FailureReason, Job, JobStatus
from service.jobs.store import Claim, Ending, Preview, Report
from service.metrics import Metrics
from service.order import Output
from service.running.device_use import DeviceUse
from service.running.publisher import Denoised, PendingPreview, Publisher

MakeJob = Callable[..., Job]
Decode = Callable[[], Any]


def grey(level: int) -> NDArray[np.uint8]:
    return np.full((16, 16, 3), level, dtype=np.uint8)


def level_of(file: bytes) -> int:
    return int(np.asarray(Image.open(BytesIO(file)))[0, 0, 0])


@dataclass
class Bench:
    """A publisher, what it reported, and the leases that are no longer wanted."""

    summary: GenerationSummary
    card: ImageCard
    now: float = 100.0
    reports: list[Report] = field(default_factory=list)
    unwanted: set[str] = field(default_factory=set)
    losses: list[DeviceLost] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.publisher = Publisher(
            Metrics(),
            self.reports.append,
            lambda claim: claim.lease not in self.unwanted,
            device=DeviceUse(),
            on_device_lost=self.losses.append,
            clock=lambda: self.now,
        )
        self.publisher.cards = {self.card.id: self.card}

    def publish(self, claim: Claim, index: int, decode: Decode) -> Event:
        """Publish a denoised result; the event is set when it is encoded."""
        is_encoded = Event()
        denoised = Denoised(
            claim,
            index,
            decode,
            self.summary,
            queue_s=1.0,
            encode_s=2.0,
            denoise_s=3.0,
            field_s=4.0,
            batch_size_mean=2.5,
        )
        self.publisher.publish(denoised, on_artifact=is_encoded.set)
        return is_encoded

    def only_ending(self) -> Ending:
        """The only report, when all is done."""
        self.publisher.close()
        (report,) = self.reports
        assert isinstance(report, Ending)
        return report


@pytest.fixture
def bench(summary: GenerationSummary, drawn_card: ImageCard) -> Iterator[Bench]:
    bench = Bench(summary, drawn_card)
    yield bench
    bench.publisher.close()


def fail_with(error: Exception) -> Decode:
    def decode() -> Any:
        raise error

    return decode


def note(is_decoded: Event) -> Decode:
    def decode() -> NDArray[np.uint8]:
        is_decoded.set()
        return grey(0)

    return decode


def test_last_result_ends_the_job_with_artifacts_in_the_order_of_its_requests(bench: Bench, make_job: MakeJob) -> None:
    claim = Claim(make_job("a", seeds=(0, 1)), "lease")
    assert bench.publish(claim, 1, lambda: grey(200)).wait(20)
    assert bench.reports == []
    bench.publish(claim, 0, lambda: grey(100))
    ending = bench.only_ending()
    assert (ending.claim, ending.status, ending.failure) == (claim, JobStatus.SUCCEEDED, None)
    assert [level_of(artifact) for artifact in ending.artifacts] == [100, 200]
    assert len(ending.receipts) == 2


@pytest.mark.parametrize(("deadline_at", "deadline_met"), [(None, None), (100.0, True), (99.0, False)])
def test_receipt_says_where_the_time_went_and_what_was_promised(
    bench: Bench, make_job: MakeJob, deadline_at: float | None, deadline_met: bool | None
) -> None:
    job = replace(make_job("a"), created_at=90.0, deadline_at=deadline_at, is_degraded=True)
    bench.publish(Claim(job, "lease"), 0, lambda: grey(0))
    (receipt,) = bench.only_ending().receipts
    seconds = receipt.seconds
    assert (seconds.queue, seconds.encode, seconds.denoise, seconds.total) == (1.0, 2.0, 3.0, 10.0)
    assert (receipt.summary, receipt.batch_size_mean, receipt.quality_requested) == (bench.summary, 2.5, 0.9)
    assert (receipt.is_degraded, receipt.deadline_met) == (True, deadline_met)


@pytest.mark.parametrize(
    ("error", "reason", "message", "param"),
    [
        (InvalidRequest("size 7 is odd", "size"), FailureReason.INVALID_REQUEST, "size 7 is odd", "size"),
        (GenerationError("no memory"), FailureReason.GENERATION_FAILED, "job a failed: no memory", None),
        (ValueError("secret"), FailureReason.GENERATION_FAILED, "job a failed while generating", None),
    ],
)
def test_failed_decoding_fails_the_job_without_our_details(
    bench: Bench, make_job: MakeJob, error: Exception, reason: FailureReason, message: str, param: str | None
) -> None:
    claim = Claim(make_job("a", seeds=(0, 1)), "lease")
    bench.publish(claim, 0, fail_with(error))
    bench.publish(claim, 1, lambda: grey(0))
    ending = bench.only_ending()
    assert ending.status is JobStatus.FAILED
    assert ending.failure is not None
    assert (ending.failure.reason, ending.failure.message, ending.failure.param) == (reason, message, param)


def test_result_of_an_ended_job_is_neither_decoded_nor_reported(bench: Bench, make_job: MakeJob) -> None:
    is_decoded = Event()
    bench.unwanted.add("lease")
    is_encoded = bench.publish(Claim(make_job("a"), "lease"), 0, note(is_decoded))
    bench.publisher.close()
    assert is_encoded.is_set()  # so its place is free
    assert not is_decoded.is_set()
    assert bench.reports == []


def test_job_claimed_again_does_not_mix_with_its_first_attempt(bench: Bench, make_job: MakeJob) -> None:
    job = make_job("a", seeds=(0, 1))
    first, second = Claim(job, "first"), Claim(job, "second")
    assert bench.publish(first, 0, lambda: grey(1)).wait(20)
    bench.unwanted.add("first")
    bench.publisher.drop_unwanted()
    bench.publish(second, 0, lambda: grey(10))
    bench.publish(second, 1, lambda: grey(20))
    ending = bench.only_ending()
    assert ending.claim is second
    assert [level_of(artifact) for artifact in ending.artifacts] == [10, 20]


def test_unfinished_results_are_counted_until_they_are_encoded(bench: Bench, make_job: MakeJob) -> None:
    gate = Event()

    def decode() -> NDArray[np.uint8]:
        assert gate.wait(20)
        return grey(0)

    claim = Claim(make_job("a", seeds=(0, 1)), "lease")
    encoded = [bench.publish(claim, index, decode) for index in (0, 1)]
    assert (bench.publisher.num_unfinished, bench.publisher.finish_seconds("drawn")) == (2, 0.0)
    gate.set()
    assert all(event.wait(20) for event in encoded)
    bench.publisher.close()
    assert bench.publisher.num_unfinished == 0
    assert bench.publisher.finish_seconds("drawn") > 0.0
    assert bench.publisher.finish_seconds("other") == 0.0


def test_finish_seconds_are_those_of_the_default_size_and_fall_slowly(bench: Bench, make_job: MakeJob) -> None:
    def publish(seconds: float, name: str, side: int) -> float:
        job = make_job(name)
        request = job.requests[0]
        assert isinstance(request, ImageRequest)
        large = replace(job, requests=(replace(request, height=side, width=side),))

        def decode() -> NDArray[np.uint8]:
            time.sleep(seconds)
            return grey(0)

        assert bench.publish(Claim(large, name), 0, decode).wait(20)
        return bench.publisher.finish_seconds("drawn")

    side = bench.card.default_height
    large_s, slow_s, fast_s = publish(0.4, "a", 2 * side), publish(0.4, "b", side), publish(0.0, "c", side)
    assert 0.1 <= large_s < 0.4 <= slow_s  # the first has four times as many pixels
    assert 0.8 * slow_s <= fast_s < slow_s


def test_results_with_a_deadline_are_made_before_others(bench: Bench, make_job: MakeJob) -> None:
    gate, made = Event(), list[str]()

    def decode(name: str) -> NDArray[np.uint8]:
        assert gate.wait(20)
        made.append(name)
        return grey(0)

    for name, deadline_at in (("running", None), ("other", None), ("urgent", 200.0)):
        job = replace(make_job(name), deadline_at=deadline_at)
        bench.publish(Claim(job, name), 0, partial(decode, name))
    gate.set()
    bench.publisher.close()
    assert made == ["running", "urgent", "other"]


def test_result_of_a_model_that_was_just_unloaded_is_made(bench: Bench, make_job: MakeJob) -> None:
    bench.publisher.cards = {}
    assert bench.publish(Claim(make_job("a"), "lease"), 0, lambda: grey(0)).wait(20)
    assert bench.only_ending().status is JobStatus.SUCCEEDED


def test_slow_decoding_of_one_model_does_not_delay_another(bench: Bench, make_job: MakeJob) -> None:
    gate = Event()

    def decode_slowly() -> NDArray[np.uint8]:
        assert gate.wait(20)
        return grey(0)

    slow = bench.publish(Claim(make_job("slow"), "slow"), 0, decode_slowly)
    fast = bench.publish(Claim(make_job("fast", model="guided"), "fast"), 0, lambda: grey(0))
    assert fast.wait(20)
    assert not slow.is_set()
    gate.set()


def test_preview_is_a_lossless_image_without_metadata(bench: Bench, make_job: MakeJob) -> None:
    job = replace(make_job("a"), output=Output(OutputFormat.JPEG, compression_quality=5))
    claim = Claim(job, "lease")
    bench.publisher.preview(PendingPreview(claim, 0, 2, lambda: grey(77)), on_preview=lambda: None)
    bench.publisher.close()
    (preview,) = bench.reports
    assert isinstance(preview, Preview)
    assert (preview.claim, preview.index, preview.number) == (claim, 0, 2)
    image = Image.open(BytesIO(preview.file))
    assert (image.format, level_of(preview.file), image.info) == ("PNG", 77, {})


@pytest.mark.parametrize("error", [EmptySurface("no surface"), ValueError("a bug")])
def test_preview_that_fails_is_left_out_and_its_job_goes_on(bench: Bench, make_job: MakeJob, error: Exception) -> None:
    claim = Claim(make_job("a"), "lease")
    bench.publisher.preview(PendingPreview(claim, 0, 0, fail_with(error)), on_preview=lambda: None)
    bench.publish(claim, 0, lambda: grey(0))
    assert bench.only_ending().status is JobStatus.SUCCEEDED


def test_preview_of_an_ended_job_is_not_made(bench: Bench, make_job: MakeJob) -> None:
    is_decoded = Event()
    bench.unwanted.add("lease")
    bench.publisher.preview(
        PendingPreview(Claim(make_job("a"), "lease"), 0, 0, note(is_decoded)), on_preview=lambda: None
    )
    bench.publisher.close()
    assert not is_decoded.is_set()
    assert bench.reports == []
