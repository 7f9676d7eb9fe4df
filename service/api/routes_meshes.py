"""Image to mesh."""

import asyncio
import base64
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Depends, Request, Response
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from models.card import MeshCard
from models.errors import InvalidRequest
from service.api.access import Access
from service.api.answering import answer
from service.api.dependencies import CallerOfRequest, DispatcherOfApp, SettingsOfApp
from service.api.errors import error_responses
from service.api.generation_route import GenerationRoute, HeadersOfGeneration, json_fields_of, media_type_of
from service.api.image_checks import ImageChecks
from service.api.input_image import decode_base64_image
from service.api.json_body import too_long
from service.api.model_names import card_of
from service.api.parsing import RANDOM_SEEDS, parse_mesh_body
from service.api.products import MESH
from service.api.schemas import MeshBody
from service.api.submission import submit
from service.api.validation import shown
from service.errors import UnsupportedMediaType
from service.keys import Scope
from service.settings import Settings

_FORM, _FILE_FIELD = "multipart/form-data", "input_image"
_MAX_CONTENT_TYPE = 1000
TEXTS = ("model", "output_format", "response_format", "priority")
"""Form fields whose values are plain text. The others are JSON, as in `budget={"preset": "fast"}`."""


class MeshRoute(GenerationRoute):
    """Also accepts the fields of the JSON body as a form, with the image as a file."""

    async def fields_of(self, request: Request) -> dict[str, Any]:
        match media_type_of(request):
            case "application/json":
                return await json_fields_of(request, file_field=_FILE_FIELD)
            case "multipart/form-data":
                return await _form_fields_of(request)
            case media_type:
                raise UnsupportedMediaType(f"the body is {shown(media_type)}; send it as application/json or {_FORM}")


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
    card = card_of(body.model, dispatcher.cards, MeshCard, settings.model_aliases)
    caller.model = card.id
    file = await asyncio.to_thread(decode_base64_image, body.input_image)
    image_checks: ImageChecks = request.app.state.image_checks
    input_image = await image_checks.checked(file)
    seed = secrets.randbelow(RANDOM_SEEDS)
    order = parse_mesh_body(body, card, input_image, default_budget=settings.default_budget, random_seed=seed)
    job = await submit(order, card, body, headers, request, dispatcher, settings)
    return await answer(job, body, headers, request, dispatcher, settings)


async def _form_fields_of(request: Request) -> dict[str, Any]:
    """The fields of a form, as in a JSON body. Raises InvalidRequest for parts that are not fields of the body."""
    settings: Settings = request.app.state.settings
    max_bytes = settings.max_body_bytes
    _check_content_type(request)
    try:
        async with request.form(max_files=1, max_fields=32, max_part_size=max_bytes) as form:
            parts = form.multi_items()
            if sum(len(value) for _, value in parts if isinstance(value, str)) > max_bytes:
                raise too_long(max_bytes, _FILE_FIELD)
            files = {name: await value.read() for name, value in parts if isinstance(value, UploadFile)}
            texts = [(name, value) for name, value in parts if isinstance(value, str)]
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise InvalidRequest(f"the form can't be read: {error.detail}", "") from error
    return await asyncio.to_thread(_fields_of, files, texts)


def _check_content_type(request: Request) -> None:
    """Raise UnsupportedMediaType unless texts are UTF-8. Some of Python's codecs, such as punycode, take seconds.

    Thousands of parameters also take long to read.
    """
    content_type = request.headers["content-type"]
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise UnsupportedMediaType(f"Content-Type has {len(content_type)} characters; use at most {_MAX_CONTENT_TYPE}")
    _, options = parse_options_header(content_type)
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8", "us-ascii"):
        raise UnsupportedMediaType(f"the form has the charset {shown(charset)}; send it as UTF-8")


def _fields_of(files: Mapping[str, bytes], texts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, data in files.items():
        if name != _FILE_FIELD:
            raise InvalidRequest(f"{shown(name)} is a file; only {_FILE_FIELD} can be one", name)
        fields[name] = base64.b64encode(data).decode("ascii")
    for name, text in texts:
        if name in fields:
            raise InvalidRequest(f"{shown(name)} is given more than once; give it once", name)
        if name == _FILE_FIELD:
            raise InvalidRequest(f"{name} is a text field; send it as a file, with a filename", name)
        fields[name] = text if name in TEXTS else _json_or_text(text)
    return fields


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # such as auto; the body's validation refuses text where it does not fit
