"""Text to image."""

import secrets
from typing import Any

from fastapi import APIRouter, Request, Response

from models.card import ImageCard
from models.file_formats import OutputFormat
from service.api.dependencies import DispatcherOfApp, SettingsOfApp
from service.api.errors import error_responses
from service.api.parsing import RANDOM_SEEDS, parse_output, parse_requests
from service.api.responses import ACCEPTED, EVENT_STREAM, MADE, ImageResponse
from service.api.schemas import ImageBody
from service.api.submission import GenerationHeaders, GenerationRoute, answer, card_of, job_of

router = APIRouter(tags=["images"], route_class=GenerationRoute)

DOCUMENTED: dict[str, Any] = {
    "response_model": ImageResponse,
    "responses": {
        200: {
            **MADE,
            "description": "The pictures; with response_format binary the one picture's file, `X-Job-ID`, `X-Seed` "
            "and the receipt as JSON in `X-Receipt`; with stream the job's events, up to "
            "`image_generation.completed` or `error`.",
            "content": {
                **{f"image/{name}": {"schema": {"type": "string", "format": "binary"}} for name in OutputFormat},
                **EVENT_STREAM,
            },
        },
        202: ACCEPTED,
        **error_responses(400, 404, 409, 413, 415, 422, 500, 503),
    },
}


@router.post("/v1/images", summary="Make pictures from text", operation_id="create_image", **DOCUMENTED)
@router.post(
    "/v1/images/generations", summary="The same, at OpenAI's path", operation_id="generate_image", **DOCUMENTED
)
async def create_image(
    body: ImageBody, request: Request, dispatcher: DispatcherOfApp, settings: SettingsOfApp, headers: GenerationHeaders
) -> Response:
    """The call waits for the result, unless it asks for a stream or, by `Prefer: respond-async`, for the job.

    A client that hangs up while it waits cancels its job, unless it gave an `Idempotency-Key` to come back with.
    """
    dispatcher.check_accepting()
    card = card_of(body.model, dispatcher, ImageCard)
    request.state.model = card.id
    requests = parse_requests(
        body,
        card,
        default_budget=settings.default_budget.to_budget(),
        random_seed=secrets.randbelow(RANDOM_SEEDS),
    )
    job = job_of(requests, parse_output(body), body, card, request, settings)
    return await answer(job, body, request, dispatcher, settings)
