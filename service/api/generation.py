"""What the routes that make something have in common: a job is made, waited for, and answered."""

import asyncio
import base64
import json
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from models.card import ModelCard
from models.errors import InvalidRequest, UnknownModel
from models.request import GenerationRequest
from service.api.errors import error_of, status_and_error
from service.api.parsing import quality_of
from service.api.responses import FileBody
from service.api.routes_jobs import content_urls
from service.api.schemas import GenerationBody, ResponseFormat
from service.api.views import receipt_body
from service.errors import ServiceError, UnsupportedMediaType
from service.jobs.job import Job, Outcome, Output, Priority
from service.scheduling.admission import admit
from service.scheduling.cost import predicted_seconds
from service.settings import Settings
from service.worker import Worker

Card = TypeVar("Card", bound=ModelCard)


class GenerationRoute(APIRoute):
    """A route whose body is JSON, and whose refusals before the job exists are counted."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle_route = super().get_route_handler()

        async def handle_generation(request: Request) -> Response:
            try:
                return await handle_route(await self.as_json(request))
            except (ServiceError, InvalidRequest, UnknownModel, RequestValidationError, HTTPException) as error:
                if not hasattr(request.state, "job_id"):
                    worker: Worker = request.app.state.worker
                    model = getattr(request.state, "model", "")
                    worker.metrics.observe_rejection(model, status_and_error(error)[1].code)
                raise

        return handle_generation

    async def as_json(self, request: Request) -> Request:
        """The request with a JSON body. Raises UnsupportedMediaType if it has none."""
        if media_type_of(request) != "application/json":
            raise UnsupportedMediaType(f"the body is '{media_type_of(request)}'; send it as application/json")
        return request


def media_type_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def refuse_promises(request: Request) -> None:
    """Headers that ask for what this server does not do, and that a client would rely on."""
    if "respond-async" in request.headers.get("prefer", "").lower():
        raise InvalidRequest("this server does not answer asynchronously; omit Prefer: respond-async", "Prefer")
    if "idempotency-key" in request.headers:
        raise InvalidRequest(
            "this server does not recognise repeated requests; omit Idempotency-Key", "Idempotency-Key"
        )


def card_of(model: str | None, worker: Worker, card_type: type[Card]) -> Card:
    """The card of `model`, or of the first model of the type. Raises UnknownModel, InvalidRequest for another type."""
    cards = {name: card for name, card in worker.cards.items() if isinstance(card, card_type)}
    kind = card_type.modality
    if model is None:
        if not cards:
            raise UnknownModel(f"no {kind} model is loaded; loaded: {', '.join(worker.cards)}")
        return next(iter(cards.values()))
    if model in cards:
        return cards[model]
    if model in worker.cards:
        able = f"try {', '.join(cards)}" if cards else f"no {kind} model is loaded"
        raise InvalidRequest(f"model '{model}' makes no {kind}, but a {worker.cards[model].modality}; {able}", "model")
    raise UnknownModel(f"there is no model '{model}'; loaded: {', '.join(worker.cards)}")


def job_of(
    requests: tuple[GenerationRequest, ...], output: Output, body: GenerationBody, card: ModelCard, request_id: str
) -> Job:
    return Job(
        id=f"job_{uuid.uuid4().hex}",
        model=card.id,
        requests=requests,
        output=output,
        priority=body.priority or Priority.NORMAL,
        quality_requested=quality_of(requests[0].budget, card),
        predicted_seconds=sum(predicted_seconds(request, card) for request in requests),
        request_id=request_id,
        created_at=time.time(),
    )


async def outcome_of(job: Job, request: Request, worker: Worker, settings: Settings) -> Outcome | None:
    """The outcome of `job` once it has succeeded; None if its client has gone before, which cancels it.

    Raises what its client is to be told if it is not accepted, or fails.
    """
    admit(job.predicted_seconds, backlog_s=worker.store.backlog_s(), max_backlog_s=settings.max_backlog_s)
    ended = worker.submit(job)
    request.state.job_id = job.id
    outcome = await _outcome_or_hang_up(ended, request)
    if outcome is None:
        worker.cancel(job.id)
    elif outcome.job.failure is not None:
        raise error_of(outcome.job.failure)
    return outcome


def client_has_gone() -> Response:
    return Response(status_code=499)  # nginx's word for it; nobody is there to read it


async def _outcome_or_hang_up(ended: Future[Outcome], request: Request) -> Outcome | None:
    """The outcome of a job; None if its client has gone before."""
    outcome = asyncio.wrap_future(ended)
    hang_up = asyncio.create_task(_hang_up(request))
    try:
        await asyncio.wait((outcome, hang_up), return_when=asyncio.FIRST_COMPLETED)
        return outcome.result() if outcome.done() else None
    finally:
        hang_up.cancel()


async def _hang_up(request: Request) -> None:
    """Return when the client has gone. Its body has been read: nothing else can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def binary_response(outcome: Outcome) -> Response:
    job = outcome.job
    receipt = receipt_body(job.receipts[0])
    headers = {
        "X-Job-ID": job.id,
        "X-Seed": str(job.requests[0].seed),
        "X-Receipt": json.dumps(receipt.model_dump(mode="json", exclude_unset=True, exclude={"decisions"})),
    }
    return Response(outcome.pictures[0], media_type=job.output.format.content_type, headers=headers)


def file_bodies(
    outcome: Outcome, response_format: ResponseFormat | None, request: Request, settings: Settings
) -> list[FileBody]:
    """The job's files, or where to fetch them. Of several each has its own receipt."""
    job, data = outcome.job, []
    urls = content_urls(job, request, settings)
    for index, made in enumerate(job.requests):
        if response_format is ResponseFormat.URL:
            file = FileBody(url=urls[index], seed=made.seed)
        else:
            file = FileBody(b64_json=base64.b64encode(outcome.pictures[index]).decode("ascii"), seed=made.seed)
        if len(job.requests) > 1:
            file.receipt = receipt_body(job.receipts[index])
        data.append(file)
    return data
