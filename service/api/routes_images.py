"""Text to image."""

import asyncio
import base64
import json
import secrets
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from models.artifact import OutputFormat
from models.card import ModelCard
from models.errors import InvalidRequest, UnknownModel
from service.api.dependencies import SettingsOfApp, WorkerOfApp
from service.api.errors import error_of, error_responses, status_and_error
from service.api.parsing import RANDOM_SEEDS, parse_output, parse_requests, quality_of
from service.api.responses import ImageResponse, PictureBody
from service.api.routes_jobs import content_urls
from service.api.schemas import ImageBody, ResponseFormat
from service.api.views import job_receipt_body, receipt_body
from service.errors import ServiceError, UnsupportedMediaType
from service.jobs.job import Job, Outcome, Priority
from service.scheduling.admission import admit
from service.scheduling.cost import predicted_seconds
from service.settings import Settings
from service.worker import Worker


class GenerationRoute(APIRoute):
    """A route that makes something: its body is JSON, and a refusal before the job exists is counted."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle_route = super().get_route_handler()

        async def handle_generation(request: Request) -> Response:
            try:
                _check_media_type(request)
                return await handle_route(request)
            except (ServiceError, InvalidRequest, UnknownModel, RequestValidationError, HTTPException) as error:
                if not hasattr(request.state, "job_id"):
                    worker: Worker = request.app.state.worker
                    model = getattr(request.state, "model", "")
                    worker.metrics.observe_rejection(model, status_and_error(error)[1].code)
                raise

        return handle_generation


router = APIRouter(tags=["images"], route_class=GenerationRoute)

DOCUMENTED: dict[str, Any] = {
    "response_model": ImageResponse,
    "responses": {
        200: {
            "description": "The pictures; with response_format binary the one picture's file, `X-Job-ID`, `X-Seed` "
            "and the receipt as JSON in `X-Receipt`.",
            "content": {f"image/{name}": {"schema": {"type": "string", "format": "binary"}} for name in OutputFormat},
        },
        **error_responses(400, 404, 413, 415, 422, 500, 503),
    },
}


@router.post("/v1/images", summary="Make pictures from text", operation_id="create_image", **DOCUMENTED)
@router.post(
    "/v1/images/generations", summary="The same, at OpenAI's path", operation_id="generate_image", **DOCUMENTED
)
async def create_image(body: ImageBody, request: Request, worker: WorkerOfApp, settings: SettingsOfApp) -> Response:
    """The call waits for the result. A client that hangs up cancels its job."""
    _refuse_promises(request)
    worker.check_accepting()
    card = _card_of(body, worker)
    request.state.model = card.id
    job = _job_of(body, card, settings, request.state.request_id)
    admit(job.predicted_seconds, backlog_s=worker.store.backlog_s(), max_backlog_s=settings.max_backlog_s)
    ended = worker.submit(job)
    request.state.job_id = job.id
    outcome = await _outcome_or_hang_up(ended, request)
    if outcome is None:
        worker.cancel(job.id)
        return Response(status_code=499)  # nginx's word for it; nobody is there to read it
    if outcome.job.failure is not None:
        raise error_of(outcome.job.failure)
    if body.response_format is ResponseFormat.BINARY:
        return _binary_response(outcome)
    urls = content_urls(job, request, settings) if body.response_format is ResponseFormat.URL else None
    return JSONResponse(_image_response(outcome, urls).model_dump(mode="json", exclude_unset=True))


def _check_media_type(request: Request) -> None:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(f"the body is '{media_type}'; send it as application/json")


def _refuse_promises(request: Request) -> None:
    """Headers that ask for what this server does not do, and that a client would rely on."""
    if "respond-async" in request.headers.get("prefer", "").lower():
        raise InvalidRequest("this server does not answer asynchronously; omit Prefer: respond-async", "Prefer")
    if "idempotency-key" in request.headers:
        raise InvalidRequest(
            "this server does not recognise repeated requests; omit Idempotency-Key", "Idempotency-Key"
        )


def _card_of(body: ImageBody, worker: Worker) -> ModelCard:
    model = next(iter(worker.cards)) if body.model is None else body.model
    if model not in worker.cards:
        raise UnknownModel(f"there is no model '{model}'; loaded: {', '.join(worker.cards)}")
    return worker.cards[model]


def _job_of(body: ImageBody, card: ModelCard, settings: Settings, request_id: str) -> Job:
    requests = parse_requests(
        body,
        card,
        default_budget=settings.default_budget.to_budget(),
        random_seed=secrets.randbelow(RANDOM_SEEDS),
    )
    return Job(
        id=f"job_{uuid.uuid4().hex}",
        model=card.id,
        requests=requests,
        output=parse_output(body),
        priority=body.priority or Priority.NORMAL,
        quality_requested=quality_of(requests[0].budget, card),
        predicted_seconds=sum(predicted_seconds(request, card) for request in requests),
        request_id=request_id,
        created_at=time.time(),
    )


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


def _binary_response(outcome: Outcome) -> Response:
    job = outcome.job
    receipt = receipt_body(job.receipts[0])
    headers = {
        "X-Job-ID": job.id,
        "X-Seed": str(job.requests[0].seed),
        "X-Receipt": json.dumps(receipt.model_dump(mode="json", exclude_unset=True, exclude={"decisions"})),
    }
    return Response(outcome.pictures[0], media_type=job.output.format.content_type, headers=headers)


def _image_response(outcome: Outcome, urls: list[str] | None) -> ImageResponse:
    job = outcome.job
    data = []
    for index, request in enumerate(job.requests):
        if urls is None:
            picture = PictureBody(b64_json=base64.b64encode(outcome.pictures[index]).decode("ascii"), seed=request.seed)
        else:
            picture = PictureBody(url=urls[index], seed=request.seed)
        if len(job.requests) > 1:
            picture.receipt = receipt_body(job.receipts[index])
        data.append(picture)
    return ImageResponse(
        created=int(job.created_at),
        id=job.id,
        model=job.model,
        data=data,
        size=f"{job.requests[0].width}x{job.requests[0].height}",
        output_format=job.output.format,
        receipt=job_receipt_body(job.receipts),
    )
