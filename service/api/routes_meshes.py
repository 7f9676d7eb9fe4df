"""Image to mesh."""

import asyncio
import secrets

from fastapi import APIRouter, Depends, Request, Response

from models.card import MeshCard
from service.api.access import Access
from service.api.answering import answer
from service.api.dependencies import CallerOfRequest, DispatcherOfApp, SettingsOfApp
from service.api.errors import error_responses
from service.api.form_body import FORM, PictureFields, PictureRoute
from service.api.generation_route import HeadersOfGeneration
from service.api.image_checks import ImageChecks
from service.api.input_image import decode_base64_image
from service.api.model_names import card_of
from service.api.parsing import RANDOM_SEEDS, parse_mesh_body
from service.api.products import MESH
from service.api.schemas import MeshBody
from service.api.submission import submit
from service.keys import Scope


class MeshRoute(PictureRoute):
    pictures = PictureFields(
        files={"input_image": 1},
        in_json=("input_image",),
        texts=("model", "output_format", "response_format", "priority"),
    )


router = APIRouter(
    tags=["meshes"],
    route_class=MeshRoute,
    dependencies=[
        Depends(
            Access(Scope.GENERATE, is_rate_limited=True, max_body_bytes=lambda settings: settings.max_mesh_body_bytes)
        )
    ],
    responses=error_responses(401, 403, 408, 429),
)

_FORM_SCHEMA = {
    "type": "object",
    "required": ["input_image"],
    "properties": {"input_image": {"type": "string", "format": "binary", "description": "The image file."}},
    "additionalProperties": {"type": "string", "description": MeshRoute.pictures.about_others},
}


@router.post(
    "/v1/meshes",
    summary="Generate a mesh from an image",
    operation_id="create_mesh",
    openapi_extra={"requestBody": {"content": {FORM: {"schema": _FORM_SCHEMA}}}},
    **MESH.documentation,
)
async def create_mesh(
    body: MeshBody,
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
    card = card_of(body.model, dispatcher.fleet, MeshCard, settings.model_aliases)
    caller.model = card.id
    file = await asyncio.to_thread(decode_base64_image, body.input_image)
    image_checks: ImageChecks = request.app.state.image_checks
    input_image = await image_checks.checked(file, "input_image")
    seed = secrets.randbelow(RANDOM_SEEDS)
    order = parse_mesh_body(body, card, input_image, default_budget=settings.default_budget, random_seed=seed)
    job = await submit(order, card, body, headers, request, dispatcher, settings)
    return await answer(job, body, headers, request, dispatcher, settings)
