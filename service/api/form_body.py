"""Forms: another way to write the JSON body of a request that has pictures, with the pictures as files."""

import asyncio
import base64
import json
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from models.errors import InvalidRequest
from service.api.generation_route import GenerationRoute, json_fields_of, media_type_of
from service.api.json_body import too_long
from service.api.validation import shown
from service.errors import UnsupportedMediaType
from service.settings import Settings

FORM = "multipart/form-data"
_MAX_CONTENT_TYPE = 1000
_IN_OBJECT = re.compile(r"([a-z_]+)\[([a-z_]+)\]")


@dataclass(frozen=True, slots=True)
class PictureFields:
    """The fields of a body that differ between its JSON and its form.

    `files` are the fields that are files in a form, and how many there may be of each. In the JSON body, a field for
    one file has its text, and one for several has a list of texts. `in_json` are the names of these texts in JSON.
    `texts` are the fields that are plain text in a form. All others are JSON, as in `budget={"preset": "fast"}`.
    """

    files: Mapping[str, int]
    in_json: Sequence[str]
    texts: Sequence[str]

    @property
    def about_others(self) -> str:
        """What the OpenAPI document says of all other parts of a form."""
        return f"The other fields of the JSON body: {', '.join(self.texts)} as plain text, the others as JSON."


class PictureRoute(GenerationRoute):
    """Accepts a JSON body with pictures, and also its fields as a form, with the pictures as files."""

    pictures: PictureFields

    async def fields_of(self, request: Request) -> dict[str, Any]:
        match media_type_of(request):
            case "application/json":
                return await json_fields_of(request, self.pictures.in_json)
            case "multipart/form-data":
                return await _form_fields_of(request, self.pictures)
            case media_type:
                raise UnsupportedMediaType(f"the body is {shown(media_type)}; send it as application/json or {FORM}")


async def _form_fields_of(request: Request, pictures: PictureFields) -> dict[str, Any]:
    """The fields of a form, as in a JSON body. Raises InvalidRequest for parts that are not fields of the body."""
    settings: Settings = request.app.state.settings
    max_bytes, max_files = settings.max_body_bytes, sum(pictures.files.values())
    _check_content_type(request)
    parser = _WholeFormParser(
        request.headers, request.stream(), max_files=max_files, max_fields=40, max_part_size=max_bytes
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"the form can't be read: {error.message}", "") from error
    try:
        parts = form.multi_items()
        if sum(len(value) for _, value in parts if isinstance(value, str)) > max_bytes:
            raise too_long(max_bytes, tuple(pictures.files))
        # Browsers send a file field that was not filled in as an empty file without a name.
        uploads = [(name, value) for name, value in parts if isinstance(value, UploadFile)]
        files = [(name, await file.read()) for name, file in uploads if file.filename or file.size]
        texts = [(name, value) for name, value in parts if isinstance(value, str)]
    finally:
        await form.close()
    return await asyncio.to_thread(_fields_of, files, texts, pictures)


class _WholeFormParser(MultiPartParser):
    """Refuses a form that is cut off. Starlette's parser leaves out the part that is not whole, such as a mask."""

    _has_ended = False

    def on_end(self) -> None:
        self._has_ended = True

    async def parse(self) -> FormData:
        self.stream = self._whole(self.stream)
        return await super().parse()

    async def _whole(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        """The chunks of `stream`. Raises MultiPartException, upon which `parse` closes the parts' files."""
        async for chunk in stream:
            yield chunk
        if not self._has_ended:
            raise MultiPartException("It ends before its last boundary.")


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


def _fields_of(
    files: Sequence[tuple[str, bytes]], texts: Sequence[tuple[str, str]], pictures: PictureFields
) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for part, data in files:
        name = part.removesuffix("[]")
        if name not in pictures.files:
            raise InvalidRequest(f"{shown(part)} is a file; only {' and '.join(pictures.files)} can be", part)
        text = base64.b64encode(data).decode("ascii")
        if pictures.files[name] > 1:
            fields.setdefault(name, []).append(text)
        else:
            _add(fields, name, text)
    for name, text in texts:
        if name.removesuffix("[]") in pictures.files:
            raise InvalidRequest(f"{shown(name)} is a text field; send it as a file, with a filename", name)
        _add(fields, name, text if name in pictures.texts else _json_or_text(text))
    return fields


def _add(fields: dict[str, Any], name: str, value: Any) -> None:
    """Add a field. `budget[preset]` adds a field to the object `budget`: OpenAI's SDKs write objects in forms so."""
    inner = _IN_OBJECT.fullmatch(name)
    if inner is not None and isinstance(fields.setdefault(inner[1], {}), dict):
        fields, key = fields[inner[1]], inner[2]
    else:
        key = name
    if key in fields:
        raise InvalidRequest(f"{shown(name)} is given more than once; give it once", name)
    fields[key] = value


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value  # such as auto; the body's validation refuses text where it does not fit
