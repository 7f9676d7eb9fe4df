"""Image and text to image."""

import asyncio
import secrets

from fastapi import APIRouter, Depends, Request, Response

from models.card import ImageCard
from models.request import size_of_png
from service.api.access import Access
from service.api.answering import answer
from service.api.dependencies import CallerOfRequest, DispatcherOfApp, SettingsOfApp
from service.api.edits import CheckedPictures, pictures_given
from service.api.errors import error_responses
from service.api.form_body import FORM, PictureFields, PictureRoute
from service.api.generation_route import HeadersOfGeneration
from service.api.image_checks import ImageChecks
from service.api.input_image import decode_base64_image
from service.api.model_names import card_of
from service.api.parsing import RANDOM_SEEDS, parse_edit_body
from service.api.products import EDIT
from service.api.schemas import MAX_PICTURES, EditBody
from service.api.submission import submit
from service.keys import Scope


class EditRoute(PictureRoute):
    pictures = PictureFields(
        files={"image": MAX_PICTURES, "mask": 1},
        in_json=("image", "images", "image_url", "mask"),
        texts=(
            *("prompt", "negative_prompt", "model", "size", "quality", "output_format", "response_format", "priority"),
            *("webhook_url", "background", "moderation", "input_fidelity", "style", "complexity", "user"),
            "safety_identifier",
        ),
    )


router = APIRouter(
    tags=["images"],
    route_class=EditRoute,
    dependencies=[
        Depends(
            Access(Scope.GENERATE, is_rate_limited=True, max_body_bytes=lambda settings: settings.max_edit_body_bytes)
        )
    ],
    responses=error_responses(401, 403, 408, 429),
)

_FILE = {"type": "string", "format": "binary"}
_FORM_SCHEMA = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "image": {**_FILE, "description": "The file of the picture to edit."},
        "image[]": {"type": "array", "items": _FILE, "description": "Files of several pictures, instead of `image`."},
        "mask": {**_FILE, "description": "The file of the mask."},
        "prompt": {"type": "string"},
    },
    "additionalProperties": {"type": "string", "description": EditRoute.pictures.about_others},
}


@router.post(
    "/v1/images/edits",
    summary="Edit images: image-to-image and inpainting",
    operation_id="edit_image",
    openapi_extra={"requestBody": {"content": {FORM: {"schema": _FORM_SCHEMA}}}},
    **EDIT.documentation,
)
async def edit_image(
    body: EditBody,
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
    card = card_of(body.model, dispatcher.fleet, ImageCard, settings.model_aliases)
    caller.model = card.id
    pictures = await _checked_pictures(body, card, request.app.state.image_checks)
    seed = secrets.randbelow(RANDOM_SEEDS)
    order = parse_edit_body(body, card, pictures, default_budget=settings.default_budget, random_seed=seed)
    job = await submit(order, card, body, headers, request, dispatcher, settings)
    return await answer(job, body, headers, request, dispatcher, settings)


async def _checked_pictures(body: EditBody, card: ImageCard, checks: ImageChecks) -> CheckedPictures:
    """Raises InvalidRequest and InvalidImage."""
    images = []
    for field, text in pictures_given(body, card):
        file = await asyncio.to_thread(decode_base64_image, text, field)
        images.append(await checks.checked(file, field))
    if body.mask is None:
        return CheckedPictures(tuple(images))
    file = await asyncio.to_thread(decode_base64_image, body.mask, "mask")
    return CheckedPictures(tuple(images), await checks.checked_mask(file, size_of_png(images[0])))
