"""Text to image."""

import secrets

from fastapi import APIRouter, Depends, Request, Response

from models.card import ImageCard
from service.api.access import Access
from service.api.answering import answer
from service.api.dependencies import CallerOfRequest, DispatcherOfApp, SettingsOfApp
from service.api.errors import error_responses
from service.api.generation_route import GenerationRoute, HeadersOfGeneration
from service.api.model_names import card_of
from service.api.parsing import RANDOM_SEEDS, parse_image_body
from service.api.products import IMAGE
from service.api.schemas import ImageBody
from service.api.submission import submit
from service.keys import Scope

router = APIRouter(
    tags=["images"],
    route_class=GenerationRoute,
    dependencies=[Depends(Access(Scope.GENERATE, is_rate_limited=True))],
    responses=error_responses(401, 403, 408, 429),
)


@router.post("/v1/images", summary="Generate images from text", operation_id="create_image", **IMAGE.documentation)
@router.post(
    "/v1/images/generations",
    summary="Generate images from text, at OpenAI's path",
    operation_id="generate_image",
    **IMAGE.documentation,
)
async def create_image(
    body: ImageBody,
    headers: HeadersOfGeneration,
    caller: CallerOfRequest,
    request: Request,
    dispatcher: DispatcherOfApp,
    settings: SettingsOfApp,
) -> Response:
    """The call waits for the result, unless it asks for a stream or, with `Prefer: respond-async`, for the job.

    A client that disconnects while it waits cancels its job, unless it gave an `Idempotency-Key` to come back with.
    """
    dispatcher.check_accepting()
    aliases = settings.model_aliases
    card = card_of(
        body.model, dispatcher.fleet, ImageCard, aliases, is_preferred=lambda card: not card.needs_input_image
    )
    caller.model = card.id
    seed = secrets.randbelow(RANDOM_SEEDS)
    order = parse_image_body(body, card, default_budget=settings.default_budget, random_seed=seed)
    job = await submit(order, card, body, headers, request, dispatcher, settings)
    return await answer(job, body, headers, request, dispatcher, settings)
