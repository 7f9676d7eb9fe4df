"""Image to mesh."""

import base64
import json
import secrets
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from models.card import MeshCard
from models.errors import InvalidRequest
from service.api.access import Access
from service.api.answering import answer
from service.api.dependencies import CallerOfRequest, DispatcherOfApp, SettingsOfApp
from service.api.errors import error_responses
from service.api.generation_route import GenerationRoute, HeadersOfGeneration, media_type_of
from service.api.image_checks import ImageChecks
from service.api.input_image import decode_base64_image
from service.api.parsing import RANDOM_SEEDS, parse_mesh_body
from service.api.products import MESH
from service.api.schemas import MeshBody
from service.api.submission import card_of, submit
from service.errors import UnsupportedMediaType
from service.keys import Scope

_FORM = "multipart/form-data"
TEXTS = ("model", "output_format", "response_format", "priority")
"""Form fields whose values are plain text. The others are JSON, as in `budget={"preset": "fast"}`."""


class MeshRoute(GenerationRoute):
    """Also accepts the fields of the JSON body as a form, with the image as a file."""

    async def as_json(self, request: Request) -> Request:
        match media_type_of(request):
            case "application/json":
                return request
            case "multipart/form-data":
                return await _form_as_json(request)
            case media_type:
                raise UnsupportedMediaType(f"the body is '{media_type}'; send it as application/json or {_FORM}")


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
    "additionalProperties": {
        "type": "string",
        "description": f"The other fields of the JSON body: {', '.join(TEXTS)} as plain text, the others as JSON.",
    },
}


@router.post(
    "/v1/meshes",
    summary="Generate a mesh from an image",
    operation_id="create_mesh",
    openapi_extra={"requestBody": {"content": {_FORM: {"schema": _FORM_SCHEMA}}}},
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
    card = card_of(body.model, dispatcher.cards, MeshCard)
    caller.model = card.id
    file = decode_base64_image(body.input_image)
    image_checks: ImageChecks = request.app.state.image_checks
    input_image = await image_checks.checked(file)
    seed = secrets.randbelow(RANDOM_SEEDS)
    order = parse_mesh_body(body, card, input_image, default_budget=settings.default_budget, random_seed=seed)
    job = await submit(order, card, body, headers, request, dispatcher, settings)
    return await answer(job, body, headers, request, dispatcher, settings)


async def _form_as_json(request: Request) -> Request:
    """The request with its form as a JSON body. Raises InvalidRequest for parts that are not fields of the body."""
    try:
        async with request.form(max_files=1, max_fields=32) as form:
            fields = await _fields_of(form)
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise InvalidRequest(f"the form can't be read: {error.detail}", "") from error
    body = json.dumps(fields).encode()
    headers = [
        (name, value) for name, value in request.scope["headers"] if name not in (b"content-type", b"content-length")
    ]
    scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
    rest = request.receive
    messages = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> Any:
        for message in messages:
            return message
        return await rest()

    return Request(scope, receive)


async def _fields_of(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if name in fields:
            raise InvalidRequest(f"{name} is given more than once; give it once", name)
        if isinstance(value, UploadFile):
            if name != "input_image":
                raise InvalidRequest(f"{name} is a file; only input_image can be one", name)
            fields[name] = base64.b64encode(await value.read()).decode("ascii")
        elif name == "input_image":
            raise InvalidRequest("input_image is a text field; send it as a file, with a filename", name)
        else:
            fields[name] = value if name in TEXTS else _json_or_text(value)
    return fields


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # such as auto; the body's validation refuses text where it does not fit
