"""The events of a job, sent to clients as server-sent events."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic_core import to_json

from models.errors import GenerationError
from service.api.errors import raise_if_unsuccessful, status_and_error
from service.api.job_views import result_body
from service.api.links import Links
from service.api.products import product_of
from service.api.queue_places import UPDATE_S, QueueWatch
from service.api.responses import ErrorBody
from service.api.schemas import ResponseFormat
from service.api.views import usage_body
from service.errors import Draining, ServiceError, StoreUnavailable
from service.jobs.job import FinishedJob, Job
from service.jobs.store import BEGINNING, Event, EventName, follow
from service.running.dispatcher import Dispatcher

# Proxies close connections that are silent for about a minute.
KEEP_ALIVE_S = 15.0

PublicEvent = tuple[str, Mapping[str, Any]]
"""The name and the data of an event, as clients see them."""

# Keeps caches and nginx's buffers from delaying events.
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def event_stream(
    job: Job,
    dispatcher: Dispatcher,
    links: Links,
    *,
    after: str = BEGINNING,
    response_format: ResponseFormat | None = None,
    cancels: bool = False,
) -> StreamingResponse:
    """The events of a job after the event `after`, up to its end.

    With `cancels`, the job is cancelled if the client disconnects first.
    """
    lines = _lines(job, dispatcher, links, after, response_format, cancels)
    return StreamingResponse(lines, media_type="text/event-stream", headers={**_HEADERS, "X-Job-ID": job.id})


async def _lines(
    job: Job,
    dispatcher: Dispatcher,
    links: Links,
    after: str,
    response_format: ResponseFormat | None,
    cancels: bool,
) -> AsyncIterator[bytes]:
    is_over, queue, told_at = False, QueueWatch(job, dispatcher.store, dispatcher.fleet), time.monotonic()
    try:
        async for event in _until_drained(
            job, dispatcher, after, lambda: UPDATE_S if queue.is_queued else KEEP_ALIVE_S
        ):
            if event is None:
                line = await _after_silence(queue, time.monotonic() - told_at)
                if line is not None:
                    told_at = time.monotonic()
                    yield line
                continue
            is_over, told_at = event.name is EventName.ENDED, time.monotonic()
            queue.is_queued = event.name is EventName.QUEUED
            *first, last = await _public(event, job, dispatcher, queue, links, response_format)
            for name, data in first:  # without the id: a client that goes on after it must get them all
                yield _line(name, data)
            yield _line(*last, event.id)
        is_over = True
    except ServiceError as error:
        is_over = True
        yield _line("error", _error(error))
    finally:
        if cancels and not is_over:
            dispatcher.cancel_soon(job.id)


async def _after_silence(queue: QueueWatch, silent_s: float) -> bytes | None:
    """The new place of a queued job, without an id since it is not in the job's history. Else, in time, a comment."""
    if queue.is_queued and (place := await queue.change()):
        return _line(EventName.QUEUED, {"id": queue.job.id, **place})
    return format_sse_event(comment="still here") if silent_s >= KEEP_ALIVE_S else None


def _line(name: str, data: Mapping[str, Any], event_id: str | None = None) -> bytes:
    return format_sse_event(event=name, id=event_id, data_str=to_json({"type": name, **data}).decode())


async def _until_drained(
    job: Job, dispatcher: Dispatcher, after: str, silence_s: Callable[[], float]
) -> AsyncIterator[Event | None]:
    """The job's events, and None after each silence of `silence_s`. Raises Draining if this server stops first."""
    events = follow(dispatcher.store, job.id, after)
    drained = asyncio.create_task(dispatcher.has_drained.wait())
    coming: asyncio.Future[Event] | None = None
    try:
        with dispatcher.open_call():
            while True:
                coming = coming or asyncio.ensure_future(anext(events))
                await asyncio.wait((coming, drained), timeout=silence_s(), return_when=asyncio.FIRST_COMPLETED)
                if coming.done():
                    try:
                        event = coming.result()
                    except StopAsyncIteration:
                        return
                    coming = None
                    yield event
                elif drained.done():
                    raise Draining(f"the server shuts down; job {job.id} goes on at others", retry_after_s=1)
                else:
                    yield None
    finally:
        drained.cancel()
        if coming is not None:
            coming.cancel()


async def _public(
    event: Event,
    job: Job,
    dispatcher: Dispatcher,
    queue: QueueWatch,
    links: Links,
    response_format: ResponseFormat | None,
) -> list[PublicEvent]:
    """The names and the data of an event, as clients see them: the end of a job is an event for each artifact."""
    product = product_of(job.requests[0])
    match event.name:
        case EventName.QUEUED:
            return [(event.name, {"id": job.id, **await queue.place()})]
        case EventName.PREVIEW:
            # Previews of an earlier version have no time.
            fields = {"id": job.id, "created_at": int(job.created_at), **product.own_fields(job)}
            return [(product.preview_event, {**fields, **product.preview_fields, **event.data})]
        case EventName.ENDED:
            return await _end(job, dispatcher, links, response_format)
        case _:
            return [(event.name, {"id": job.id, **event.data})]


async def _end(
    job: Job, dispatcher: Dispatcher, links: Links, response_format: ResponseFormat | None
) -> list[PublicEvent]:
    snapshot = await dispatcher.store.get(job.id)
    try:
        raise_if_unsuccessful(snapshot)
        finished = await dispatcher.store.content(job.id)
    except StoreUnavailable:
        raise  # the job may have a result, so the client must not take this for the job's end
    except (ServiceError, GenerationError) as error:
        return [("error", _error(error))]
    return _completed(finished, response_format, links)


def _completed(finished: FinishedJob, response_format: ResponseFormat | None, links: Links) -> list[PublicEvent]:
    """An event for each artifact, with OpenAI's fields. The last one also has the whole result."""
    job, product = finished.job, product_of(finished.job.requests[0])
    result = result_body(finished, response_format, links).model_dump(mode="json", exclude_unset=True)
    events: list[PublicEvent] = []
    for index, (file, receipt) in enumerate(zip(result["data"], finished.state.receipts, strict=True)):
        data = {name: value for name, value in file.items() if name != "receipt"}
        data |= {"id": job.id, "index": index, "created_at": int(finished.state.ended_at or job.created_at)}
        data |= {"model": job.model, "output_format": job.output.format, **product.own_fields(job)}
        if product.has_usage:
            data["usage"] = usage_body([receipt]).model_dump()
        if index == len(result["data"]) - 1:
            data = {**result, **data}
        events.append((product.completed_event, data))
    return events


def _error(error: Exception) -> dict[str, Any]:
    assert isinstance(error, ServiceError | GenerationError)
    return ErrorBody(error=status_and_error(error)[1]).model_dump()
