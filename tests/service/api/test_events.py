"""Server-sent events over a store, without HTTP and without a worker that runs jobs."""

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent

from models.report import GenerationSummary
from service.api.events import event_stream
from service.api.job_views import result_body
from service.api.links import Links
from service.api.schemas import ResponseFormat
from service.errors import StoreUnavailable
from service.jobs.job import Failure, FailureReason, Job, JobStatus, Receipt, StageSeconds
from service.jobs.store import Claim, Ending, Fit, Preview, Progress
from service.running.dispatcher import Dispatcher
from service.settings import Settings

pytestmark = pytest.mark.anyio

MakeJob = Callable[..., Job]


@dataclass
class Bench:
    """A dispatcher that does not run, so that the test plays the worker."""

    dispatcher: Dispatcher
    summary: GenerationSummary

    async def claimed(self, job: Job) -> Claim:
        await self.dispatcher.store.add(job)
        claim = await self.dispatcher.store.claim(lambda _: Fit.NOW)
        assert claim is not None
        return claim

    async def succeed(self, claim: Claim, *artifacts: bytes) -> None:
        receipts = (Receipt(self.summary, 0.9, StageSeconds(0.1, 0.2, 0.3, 0.4, 1.0), 1.0),) * len(claim.job.requests)
        ending = Ending(claim, JobStatus.SUCCEEDED, receipts=receipts, artifacts=artifacts or (b"image",))
        await self.dispatcher.store.end(ending)

    def stream(self, job: Job, **options: Any) -> Any:
        """An iterator over the parts of the stream."""
        response = event_stream(job, self.dispatcher, Links("http://test", None), **options)
        return response.body_iterator

    async def events(self, job: Job, **options: Any) -> list[tuple[str | None, str, dict[str, Any]]]:
        """(id, name, data) of all events up to the end of the stream."""
        async with asyncio.timeout(20):
            return [parsed(part) async for part in self.stream(job, **options)]


def parsed(part: bytes) -> tuple[str | None, str, dict[str, Any]]:
    fields = dict(line.split(": ", 1) for line in part.decode().strip().splitlines())
    return fields.get("id"), fields["event"], json.loads(fields["data"])


@pytest.fixture
def bench(make_dispatcher: Callable[[Settings], Dispatcher], summary: GenerationSummary) -> Iterator[Bench]:
    dispatcher = make_dispatcher(Settings())
    yield Bench(dispatcher, summary)
    assert dispatcher.worker.stop(20)


async def test_previews_of_transparent_images_are_opaque(bench: Bench, make_job: MakeJob) -> None:
    claim = await bench.claimed(make_job("a", is_transparent=True))
    await bench.dispatcher.store.add_preview(Preview(claim, 0, 0, b"small", 5.5))
    await bench.succeed(claim)
    backgrounds = [data["background"] for _, _, data in await bench.events(claim.job) if "background" in data]
    assert backgrounds == ["opaque", "transparent"]


async def test_events_have_public_names_and_the_job(bench: Bench, make_job: MakeJob) -> None:
    claim = await bench.claimed(make_job("a"))
    await bench.dispatcher.store.record(Progress(claim, 2, 4, 0.5, 1.5))
    await bench.dispatcher.store.add_preview(Preview(claim, 0, 0, b"small", 5.5))
    await bench.succeed(claim)
    events = await bench.events(claim.job)
    assert [name for _, name, _ in events] == [
        *("job.queued", "job.started", "job.progress", "image_generation.partial_image", "image_generation.completed")
    ]
    assert all(data["type"] == name and data["id"] == "a" for _, name, data in events)
    assert events[2][2]["step"] == 2
    assert events[3][2]["b64_json"] == base64.b64encode(b"small").decode()
    result = events[4][2]
    assert result["b64_json"] == result["data"][0]["b64_json"] == base64.b64encode(b"image").decode()
    assert result["receipt"]["quality_applied"] == 0.8
    assert (events[3][2]["created_at"], events[3][2]["output_format"]) == (5, "png")
    assert ImageGenPartialImageEvent.model_validate(events[3][2], strict=True)
    assert ImageGenCompletedEvent.model_validate(result, strict=True)


async def test_each_image_is_completed_by_an_event_and_the_last_one_has_the_whole_result(
    bench: Bench, make_job: MakeJob
) -> None:
    claim = await bench.claimed(make_job("a", seeds=(3, 4)))
    await bench.succeed(claim, b"one", b"two")
    *before, first, last = await bench.events(claim.job)
    completed = [data for _, name, data in (first, last) if name == "image_generation.completed"]
    assert [(data["index"], data["seed"]) for data in completed] == [(0, 3), (1, 4)]
    assert [base64.b64decode(data["b64_json"]) for data in completed] == [b"one", b"two"]
    assert all(ImageGenCompletedEvent.model_validate(data, strict=True) for data in completed)
    # Only the last has what our clients wait for, and an id: who comes back after the first gets both again.
    assert "data" not in completed[0]
    assert [file["seed"] for file in completed[1]["data"]] == [3, 4]
    assert (first[0], last[0]) == (None, "3-0")
    assert await bench.events(claim.job, after=before[-1][0]) == [first, last]
    # Together they count what the answer without a stream counts.
    whole = result_body(await bench.dispatcher.store.content("a"), None, Links("", None)).model_dump()["usage"]
    assert whole["total_tokens"] == sum(data["usage"]["total_tokens"] for data in completed) > 0


async def test_events_of_a_mesh_have_no_usage(bench: Bench, make_mesh_job: MakeJob) -> None:
    claim = await bench.claimed(make_mesh_job("a"))
    await bench.succeed(claim)
    _, name, result = (await bench.events(claim.job))[-1]
    assert (name, result["octree_resolution"], "usage" in result) == ("mesh_generation.completed", 32, False)


async def test_stream_begins_after_the_event_that_the_client_has(bench: Bench, make_job: MakeJob) -> None:
    claim = await bench.claimed(make_job("a"))
    await bench.succeed(claim)
    events = await bench.events(claim.job)
    assert await bench.events(claim.job, after=events[0][0]) == events[1:]
    assert await bench.events(claim.job, after=events[-1][0]) == []


async def test_result_as_url_has_no_file(bench: Bench, make_job: MakeJob) -> None:
    claim = await bench.claimed(make_job("a"))
    await bench.succeed(claim)
    result = (await bench.events(claim.job, response_format=ResponseFormat.URL))[-1][2]
    assert result["url"] == "http://test/v1/jobs/a/content?index=0"
    assert "b64_json" not in result


@pytest.mark.parametrize("end", ["failed", "cancelled"])
async def test_unsuccessful_job_ends_with_its_error(bench: Bench, make_job: MakeJob, end: str) -> None:
    claim = await bench.claimed(make_job("a"))
    if end == "failed":
        failure = Failure(FailureReason.INVALID_REQUEST, "too many tokens", "prompt")
        await bench.dispatcher.store.end(Ending(claim, JobStatus.FAILED, failure=failure))
    else:
        await bench.dispatcher.store.cancel("a")
    event_id, name, data = (await bench.events(claim.job))[-1]
    expected = {"failed": ("invalid_parameter", "prompt"), "cancelled": ("job_cancelled", None)}[end]
    assert (name, data["error"]["code"], data["error"]["param"]) == ("error", *expected)
    assert event_id is not None


async def test_silent_stream_is_kept_alive(bench: Bench, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.api.events.KEEP_ALIVE_S", 0.001)
    claim = await bench.claimed(make_job("a"))
    stream = bench.stream(claim.job)
    parts = [await anext(stream) for _ in range(4)]
    assert [part.decode().split(":")[0] for part in parts] == ["event", "event", "", ""]
    await bench.succeed(claim)
    async with asyncio.timeout(20):
        rest = [part async for part in stream if not part.startswith(b":")]
    assert [parsed(part)[1] for part in rest] == ["image_generation.completed"]


async def test_stream_of_a_queued_job_tells_its_place_and_again_when_that_changes(
    bench: Bench, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.api.events.UPDATE_S", 0.001)
    store = bench.dispatcher.store
    for name in ("first", "second", "a"):
        await store.add(make_job(name))
    stream = bench.stream(make_job("a"))
    async with asyncio.timeout(20):
        event_id, name, data = parsed(await anext(stream))
        assert (event_id, name) == ("1-0", "job.queued")
        assert data == {"type": "job.queued", "id": "a", "position": 2, "eta_s": 6.0}  # three jobs of 2 s
        await store.cancel("second")
        update = parsed(await anext(stream))
        # Without an id, so that Last-Event-ID stays that of the last event in the job's history.
        assert update == (None, "job.queued", {"type": "job.queued", "id": "a", "position": 1, "eta_s": 4.0})
        # A client that connects again is told the place too, and no event twice.
        resumed = parsed(await anext(bench.stream(make_job("a"), after="1-0")))
        assert resumed == update
        await store.claim(lambda _: Fit.NOW)
        assert parsed(await anext(stream))[2]["position"] == 0
        claim = await store.claim(lambda _: Fit.NOW)
        assert claim is not None
        await bench.succeed(claim)
        rest = [parsed(part) async for part in stream]
    assert [(event_id, name) for event_id, name, _ in rest] == [
        ("2-0", "job.started"),
        ("3-0", "image_generation.completed"),
    ]
    assert "position" not in (await bench.events(claim.job))[0][2]  # it is no longer queued


async def test_stream_of_a_queued_job_goes_on_while_its_place_is_unknown(
    bench: Bench, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def lost(job_ids: list[str]) -> list[int | None]:
        raise StoreUnavailable("Redis can't be reached")

    monkeypatch.setattr("service.api.events.UPDATE_S", 0.001)
    monkeypatch.setattr("service.api.events.KEEP_ALIVE_S", 0.001)
    monkeypatch.setattr(bench.dispatcher.store, "positions", lost)
    await bench.dispatcher.store.add(make_job("a"))
    stream = bench.stream(make_job("a"))
    assert parsed(await anext(stream))[2] == {"type": "job.queued", "id": "a"}
    assert (await anext(stream)).startswith(b":")
    await bench.dispatcher.store.cancel("a")
    async with asyncio.timeout(20):
        assert [parsed(part)[1] async for part in stream if not part.startswith(b":")] == ["error"]


async def test_draining_server_ends_the_stream_so_that_the_client_can_resume_elsewhere(
    bench: Bench, make_job: MakeJob
) -> None:
    claim = await bench.claimed(make_job("a"))
    bench.dispatcher.has_drained.set()
    events = await bench.events(claim.job, cancels=True)
    event_id, name, data = events[-1]
    assert (event_id, name, data["error"]["code"]) == (None, "error", "draining")
    assert (await bench.dispatcher.store.get("a")).state.status is JobStatus.RUNNING


@pytest.mark.parametrize("cancels", [True, False])
async def test_client_that_disconnects_cancels_its_job_only_if_it_waits_for_it(
    bench: Bench, make_job: MakeJob, cancels: bool
) -> None:
    claim = await bench.claimed(make_job("a"))
    async with bench.dispatcher.running():
        stream = bench.stream(claim.job, cancels=cancels)
        await anext(stream)
        await stream.aclose()
        for _ in range(10):  # a task that would cancel the job runs now
            await asyncio.sleep(0)
        if cancels:
            async with asyncio.timeout(20):
                assert (await bench.events(claim.job))[-1][2]["error"]["code"] == "job_cancelled"
        else:
            assert (await bench.dispatcher.store.get("a")).state.status is JobStatus.RUNNING
            await bench.succeed(claim)
