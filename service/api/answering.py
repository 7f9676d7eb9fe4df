"""From a recorded job to its HTTP answer: the result, the job, or a stream of events."""

import asyncio
import math
from urllib.parse import urlsplit

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from service.api.errors import raise_if_unsuccessful
from service.api.events import event_stream
from service.api.generation_route import CLIENT_CLOSED_REQUEST, GenerationHeaders
from service.api.job_views import binary_response, job_body, result_body
from service.api.links import Links, links_of
from service.api.queue_places import queue_place
from service.api.schemas import ImageBody, MeshBody, ResponseFormat
from service.errors import Draining
from service.jobs.job import Job, JobSnapshot
from service.jobs.store import ended
from service.running.dispatcher import Dispatcher
from service.running.fleet import RETRY_AFTER_S
from service.settings import Settings

# After draining, answers that are about to be sent may take this long.
_LAST_ANSWER_S = 1.0


async def answer(
    job: Job,
    body: ImageBody | MeshBody,
    headers: GenerationHeaders,
    request: Request,
    dispatcher: Dispatcher,
    settings: Settings,
) -> Response:
    """Answer as the client wants: with a stream of events, with the result, or with the job if it takes too long.

    A client that disconnects while it waits cancels its job, unless it gave an idempotency key: with the key it can
    come back. Raises the error to answer if the job fails or is cancelled, and Draining if this server stops first.
    """
    links, began_at = links_of(request, settings), dispatcher.store.clock()
    cancels = headers.idempotency_key is None
    if body.stream:
        return event_stream(job, dispatcher, links, response_format=body.response_format, cancels=cancels)
    wait_s = headers.wait_s if headers.is_async else None
    ended_job = None if wait_s == 0 else await _ended_or_gone(job, request, dispatcher, wait_s)
    if ended_job is not None:
        raise_if_unsuccessful(ended_job)
        result = await _result(job, body.response_format or _default_format(body, settings), dispatcher, links)
        file_at = job.created_at + max(receipt.seconds.total for receipt in ended_job.state.receipts)
        if file_at > began_at:  # else it is the job of an earlier call
            dispatcher.note_delivery(dispatcher.store.clock() - file_at)
        return result
    if headers.is_async and not await request.is_disconnected():
        return await _accepted(job, dispatcher, links)
    if cancels:
        dispatcher.cancel_soon(job.id)
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def _default_format(body: ImageBody | MeshBody, settings: Settings) -> ResponseFormat:
    """At OpenAI, `dall-e-2` and `dall-e-3` answer with links by default, and other models with files.

    Clients rely on both: LangChain for Python reads links, LibreChat files, and neither asks for them.
    """
    if body.model is not None and body.model.startswith("dall-e-"):
        return ResponseFormat.URL
    return ResponseFormat(settings.default_response_format)


async def _result(job: Job, response_format: ResponseFormat, dispatcher: Dispatcher, links: Links) -> Response:
    finished = await dispatcher.store.content(job.id)
    if response_format is ResponseFormat.BINARY:
        return binary_response(finished)
    result = result_body(finished, response_format, links)
    return JSONResponse(result.model_dump(mode="json", exclude_unset=True), headers={"X-Job-ID": job.id})


async def _accepted(job: Job, dispatcher: Dispatcher, links: Links) -> JSONResponse:
    seconds = await dispatcher.backlog_s(job.model)
    headers = {
        "X-Job-ID": job.id,
        "Location": urlsplit(links.to_job(job)).path,
        "Retry-After": str(max(1, math.ceil(seconds)) if math.isfinite(seconds) else RETRY_AFTER_S),
        "Preference-Applied": "respond-async",
    }
    snapshot = await dispatcher.store.get(job.id)
    body = job_body(snapshot, links, await queue_place(snapshot, dispatcher.store, dispatcher.fleet))
    return JSONResponse(body.model_dump(mode="json", exclude_unset=True), 202, headers)


async def _ended_or_gone(
    job: Job, request: Request, dispatcher: Dispatcher, wait_s: float | None
) -> JobSnapshot | None:
    """The job once it has ended; None if its client disconnects first, or after `wait_s`.

    Raises Draining if this server stops first; other servers continue the job.
    """
    waits = [asyncio.ensure_future(wait) for wait in (_disconnected(request), dispatcher.has_drained.wait())]
    ending = asyncio.create_task(ended(dispatcher.store, job.id))
    try:
        with dispatcher.open_call():
            await asyncio.wait((ending, *waits), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if dispatcher.has_drained.is_set() and not ending.done():
            await asyncio.wait((ending,), timeout=_LAST_ANSWER_S)
            if not ending.done():
                raise Draining(f"the server shuts down; job {job.id} goes on at others", retry_after_s=1)
        return ending.result() if ending.done() else None
    finally:
        for task in (ending, *waits):
            task.cancel()


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected. The body has been read, so no other message can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
