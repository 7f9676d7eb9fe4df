"""What the routes that make something have in common: a job is made, recorded, and answered in one of three ways."""

import asyncio
import hashlib
import math
import re
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from models.budget import resolve
from models.card import ModelCard
from models.errors import InvalidRequest, UnknownModel
from models.request import ImageRequest, LatencyBudget, MeshRequest, QualityBudget
from service.api.access import owner_of
from service.api.errors import error_of, status_and_error
from service.api.events import event_stream
from service.api.job_views import base_url, binary_response, job_body, result_body
from service.api.parsing import quality_of
from service.api.schemas import GenerationBody, ResponseFormat
from service.errors import Draining, JobCancelled, ServiceError, UnsupportedMediaType
from service.jobs.job import Job, JobStatus, Output, Priority
from service.jobs.store import Idempotency, ended
from service.running.dispatcher import Dispatcher
from service.scheduling.admission import admit
from service.scheduling.cost import predicted_seconds
from service.scheduling.deadline import check_reachable
from service.scheduling.load import lowered_quality
from service.settings import Settings
from service.webhooks import check_webhook_url

Card = TypeVar("Card", bound=ModelCard)

# Printable ASCII, of a length that stores can take.
_IDEMPOTENCY_KEY = re.compile(r"[\x20-\x7e]{1,255}")
_WAIT = re.compile(r"wait\s*=\s*([0-9]{1,6})", re.ASCII)
# What `draining` leaves to an answer that is already on its way.
_LAST_ANSWER_S = 1.0


def _generation_headers(
    prefer: Annotated[
        str | None,
        Header(description="`respond-async` answers 202 with the job; with `wait=N` only after N seconds."),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="Calls with the same key and body make one job.",
            max_length=255,
            json_schema_extra={"pattern": "^[ -~]{1,255}$"},
        ),
    ] = None,
) -> None:
    """What `answer` reads of the headers, for the OpenAPI document."""


GenerationHeaders = Annotated[None, Depends(_generation_headers)]


class GenerationRoute(APIRoute):
    """A route whose body is JSON, and whose refusals before the job exists are counted."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle_route = super().get_route_handler()

        async def handle_generation(request: Request) -> Response:
            try:
                return await handle_route(await self.as_json(request))
            except (ServiceError, InvalidRequest, UnknownModel, RequestValidationError, HTTPException) as error:
                if not hasattr(request.state, "job_id"):
                    dispatcher: Dispatcher = request.app.state.dispatcher
                    model = getattr(request.state, "model", "")
                    dispatcher.metrics.observe_rejection(model, status_and_error(error)[1].code)
                raise

        return handle_generation

    async def as_json(self, request: Request) -> Request:
        """The request with a JSON body. Raises UnsupportedMediaType if it has none."""
        if media_type_of(request) != "application/json":
            raise UnsupportedMediaType(f"the body is '{media_type_of(request)}'; send it as application/json")
        return request


def media_type_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def card_of(model: str | None, dispatcher: Dispatcher, card_type: type[Card]) -> Card:
    """The card of `model`, or of the first model of the type. Raises UnknownModel, InvalidRequest for another type."""
    loaded = dispatcher.cards
    cards = {name: card for name, card in loaded.items() if isinstance(card, card_type)}
    kind = card_type.modality
    if model is None:
        if not cards:
            raise UnknownModel(f"no {kind} model is loaded; loaded: {', '.join(loaded)}")
        return next(iter(cards.values()))
    if model in cards:
        return cards[model]
    if model in loaded:
        able = f"try {', '.join(cards)}" if cards else f"no {kind} model is loaded"
        raise InvalidRequest(f"model '{model}' makes no {kind}, but a {loaded[model].modality}; {able}", "model")
    raise UnknownModel(f"there is no model '{model}'; loaded: {', '.join(loaded)}")


def job_of(
    requests: tuple[ImageRequest | MeshRequest, ...],
    output: Output,
    body: GenerationBody,
    card: ModelCard,
    request: Request,
    settings: Settings,
) -> Job:
    """The job that `body` asks for. Raises InvalidRequest for ways of answering that exclude one another."""
    is_async = prefers_async(request)
    num_previews = body.partial_images or 0
    if body.stream and is_async:
        raise InvalidRequest("stream and Prefer: respond-async exclude one another; choose one", "stream")
    if body.stream and body.response_format is ResponseFormat.BINARY:
        raise InvalidRequest("a stream can't hold response_format binary; try b64_json or url", "response_format")
    if num_previews and not (body.stream or is_async):
        raise InvalidRequest(
            f"partial_images {num_previews} needs stream, or Prefer: respond-async; try 0", "partial_images"
        )
    if body.webhook_url is not None:
        check_webhook_url(body.webhook_url, settings.webhook_hosts)
    return Job(
        id=f"job_{uuid.uuid4().hex}",
        model=card.id,
        requests=requests,
        output=output,
        priority=body.priority or Priority.NORMAL,
        quality_requested=quality_of(requests[0].budget, card),
        predicted_seconds=sum(predicted_seconds(request, card) for request in requests),
        request_id=request.state.request_id,
        created_at=time.time(),
        owner=owner_of(request),
        num_previews=num_previews,
        webhook_url=body.webhook_url,
    )


def prefers_async(request: Request) -> bool:
    """Whether the client would rather be told where to look than wait (RFC 7240, section 4.1)."""
    return "respond-async" in request.headers.get("prefer", "").lower()


async def answer(
    job: Job, body: GenerationBody, request: Request, dispatcher: Dispatcher, settings: Settings
) -> Response:
    """Record `job` and answer as its client wants: with the result, with the job, or with a stream of events.

    Raises what the client is to be told if the job is not accepted, or fails.
    """
    idempotency = _idempotency(body, request)
    job = await _recorded(job, body, idempotency, dispatcher, settings)
    request.state.job_id = job.id
    base = base_url(request, settings)
    # A client that gave a key means to come back with it.
    cancels = idempotency is None
    if body.stream:
        return event_stream(job, dispatcher, base, response_format=body.response_format, cancels=cancels)
    is_async = prefers_async(request)
    wait_s = _preferred_wait_s(request) if is_async else None
    done = None if wait_s == 0 else await _ended_or_gone(job, request, dispatcher, wait_s)
    if done is None and is_async and not await request.is_disconnected():
        return await _accepted(job.id, dispatcher, base)
    if done is None:
        if cancels:
            dispatcher.cancel_soon(job.id)
        return Response(status_code=499)  # nginx's word for it; nobody is there to read it
    if done.failure is not None:
        raise error_of(done.failure)
    if done.status is JobStatus.CANCELLED:
        raise JobCancelled(f"job {done.id} was cancelled")
    outcome = await dispatcher.store.content(done.id)
    if body.response_format is ResponseFormat.BINARY:
        return binary_response(outcome)
    result = result_body(outcome, body.response_format, base)
    return JSONResponse(result.model_dump(mode="json", exclude_unset=True), headers={"X-Job-ID": job.id})


async def _recorded(
    job: Job, body: GenerationBody, idempotency: Idempotency | None, dispatcher: Dispatcher, settings: Settings
) -> Job:
    """`job`, admitted and queued; or the one that its key made before, which was admitted then."""
    if idempotency is not None and (made := await dispatcher.store.find(idempotency)) is not None:
        return made
    backlog_s = await dispatcher.store.backlog_s()
    job = _with_promises(job, body, dispatcher, settings, backlog_s)
    admit(job.predicted_seconds, backlog_s=backlog_s, max_backlog_s=settings.max_backlog_s)
    return await dispatcher.store.add(job, idempotency)


async def _accepted(job_id: str, dispatcher: Dispatcher, base: str) -> JSONResponse:
    headers = {
        "X-Job-ID": job_id,
        "Location": f"/v1/jobs/{job_id}",
        "Retry-After": str(max(1, math.ceil(await dispatcher.store.backlog_s()))),
        "Preference-Applied": "respond-async",
    }
    body = job_body(await dispatcher.store.get(job_id), base)
    return JSONResponse(body.model_dump(mode="json", exclude_unset=True), 202, headers)


def _preferred_wait_s(request: Request) -> float:
    wait = _WAIT.search(request.headers["prefer"].lower())
    return float(wait[1]) if wait else 0.0


def _with_promises(job: Job, body: GenerationBody, dispatcher: Dispatcher, settings: Settings, backlog_s: float) -> Job:
    """The job with its deadline, or with what load takes of its quality. Raises DeadlineUnreachable."""
    card, request = dispatcher.cards[job.model], job.requests[0]
    if isinstance(request.budget, LatencyBudget):
        finish_s = dispatcher.worker.finish_seconds(job.model)
        check_reachable(request, card, num_results=len(job.requests), backlog_s=backlog_s, finish_s=finish_s)
        return replace(job, deadline_at=job.created_at + request.budget.latency_s)
    default_budget = settings.default_budget
    asked = body.budget or (default_budget if request.budget == default_budget.to_budget() else None)
    if asked is None or asked.min_quality is None:
        return job
    wanted = resolve(request.budget, card.curve).quality
    quality = lowered_quality(wanted, asked.min_quality, backlog_s=backlog_s, max_backlog_s=settings.max_backlog_s)
    lowered = QualityBudget(quality)
    if resolve(lowered, card.curve).quality >= wanted:
        return job
    requests = tuple(replace(request, budget=lowered) for request in job.requests)
    seconds = sum(predicted_seconds(request, card) for request in requests)
    return replace(job, requests=requests, predicted_seconds=seconds, is_degraded=True)


def _idempotency(body: GenerationBody, request: Request) -> Idempotency | None:
    key = request.headers.get("idempotency-key")
    if key is None:
        return None
    if not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest("Idempotency-Key must have 1 to 255 printable ASCII characters", "Idempotency-Key")
    asked = f"{request.url.path} {body.model_dump_json(exclude_unset=True)}"
    return Idempotency(owner_of(request) or "", key, hashlib.sha256(asked.encode()).hexdigest())


async def _ended_or_gone(job: Job, request: Request, dispatcher: Dispatcher, wait_s: float | None) -> Job | None:
    """The job once it has ended; None if its client has gone before, or `wait_s` has passed.

    Raises Draining if this server stops before, while others go on with the job.
    """
    waits = [asyncio.ensure_future(wait) for wait in (_hang_up(request), dispatcher.has_drained.wait())]
    outcome = asyncio.create_task(ended(dispatcher.store, job.id))
    try:
        await asyncio.wait((outcome, *waits), timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
        if dispatcher.has_drained.is_set() and not outcome.done():
            await asyncio.wait((outcome,), timeout=_LAST_ANSWER_S)
            if not outcome.done():
                raise Draining(f"the server shuts down; job {job.id} goes on at others", retry_after_s=1)
        return outcome.result() if outcome.done() else None
    finally:
        for task in (outcome, *waits):
            task.cancel()


async def _hang_up(request: Request) -> None:
    """Return when the client has gone. Its body has been read: nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
