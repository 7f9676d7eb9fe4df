"""Text to image."""

import secrets
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from models.artifact import OutputFormat
from models.card import ImageCard
from service.api.dependencies import SettingsOfApp, WorkerOfApp
from service.api.errors import error_responses
from service.api.generation import (
    GenerationRoute,
    binary_response,
    card_of,
    client_has_gone,
    file_bodies,
    job_of,
    outcome_of,
    refuse_promises,
)
from service.api.parsing import RANDOM_SEEDS, parse_output, parse_requests
from service.api.responses import ImageResponse
from service.api.schemas import ImageBody, ResponseFormat
from service.api.views import job_receipt_body

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
    refuse_promises(request)
    worker.check_accepting()
    card = card_of(body.model, worker, ImageCard)
    request.state.model = card.id
    requests = parse_requests(
        body,
        card,
        default_budget=settings.default_budget.to_budget(),
        random_seed=secrets.randbelow(RANDOM_SEEDS),
    )
    job = job_of(requests, parse_output(body), body, card, request.state.request_id)
    outcome = await outcome_of(job, request, worker, settings)
    if outcome is None:
        return client_has_gone()
    if body.response_format is ResponseFormat.BINARY:
        return binary_response(outcome)
    job, made = outcome.job, requests[0]
    answer = ImageResponse(
        created=int(job.created_at),
        id=job.id,
        model=job.model,
        data=file_bodies(outcome, body.response_format, request, settings),
        size=f"{made.width}x{made.height}",
        output_format=job.output.format,
        receipt=job_receipt_body(job.receipts),
    )
    return JSONResponse(answer.model_dump(mode="json", exclude_unset=True))
