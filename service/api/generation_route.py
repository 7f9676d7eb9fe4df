"""The route class and the headers that all generation endpoints share."""

import asyncio
import re
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.request import parse_http_list

from fastapi import Depends, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from models.errors import InvalidRequest, UnknownModel
from service.api.caller import caller_of
from service.api.errors import status_and_error
from service.api.json_body import parse_json
from service.api.validation import shown
from service.errors import ModelUnavailable, ServiceError, UnsupportedMediaType
from service.running.dispatcher import Dispatcher
from service.settings import Settings

_WAIT = re.compile(r"[0-9]{1,6}", re.ASCII)


CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that closed the connection; nobody receives it."""


class ParsedRequest(Request):
    """A request whose body has been read and parsed, in the form in which FastAPI asks for it."""

    def __init__(self, request: Request, fields: dict[str, Any]) -> None:
        headers = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
        scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
        super().__init__(scope, request.receive)
        self._fields = fields

    async def body(self) -> bytes:
        return b"{}"  # FastAPI calls json() if there is a body

    async def json(self) -> dict[str, Any]:
        return self._fields


class GenerationRoute(APIRoute):
    """A route that takes a JSON body, and counts the requests that it refuses before a job exists."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle_route = super().get_route_handler()

        async def handle_generation(request: Request) -> Response:
            try:
                _check_not_compressed(request)
                return await handle_route(ParsedRequest(request, await self.fields_of(request)))
            except ClientDisconnect:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            except (ServiceError, InvalidRequest, UnknownModel, RequestValidationError, HTTPException) as error:
                caller = caller_of(request.scope)
                if caller.job_id is None:
                    dispatcher: Dispatcher = request.app.state.dispatcher
                    model = error.model if isinstance(error, ModelUnavailable) else caller.model
                    dispatcher.metrics.observe_rejection(model, status_and_error(error)[1].code)
                raise

        return handle_generation

    async def fields_of(self, request: Request) -> dict[str, Any]:
        """The fields of the body. Raises UnsupportedMediaType for another type, and what `parse_json` raises."""
        if media_type_of(request) != "application/json":
            raise UnsupportedMediaType(f"the body is {shown(media_type_of(request))}; send it as application/json")
        return await json_fields_of(request)


async def json_fields_of(request: Request, file_fields: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a JSON body, parsed in a thread. Raises what `parse_json` raises."""
    settings: Settings = request.app.state.settings
    body = b"".join([chunk async for chunk in request.stream()])
    return await asyncio.to_thread(parse_json, body, max_bytes=settings.max_body_bytes, file_fields=file_fields)


def _check_not_compressed(request: Request) -> None:
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise UnsupportedMediaType(f"the body has Content-Encoding {shown(encoding)}; send it uncompressed")


def media_type_of(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True, slots=True)
class GenerationHeaders:
    """How the client wants its answer. `wait_s` is how long an asynchronous call waits before it answers 202."""

    is_async: bool = False
    wait_s: float = 0.0
    idempotency_key: str | None = None


def _generation_headers(
    prefer: Annotated[
        str | None,
        Header(
            description="`respond-async` answers 202 with the job at once; with `wait=N`, after at most N seconds "
            "(RFC 7240)."
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(
            description="Calls with equal key and body create one job.",
            max_length=255,
            json_schema_extra={"pattern": "^[ -~]{1,255}$"},
        ),
    ] = None,
) -> GenerationHeaders:
    preferences = _preferences(prefer or "")
    wait = preferences.get("wait", "")
    return GenerationHeaders(
        is_async="respond-async" in preferences,
        wait_s=float(wait) if _WAIT.fullmatch(wait) else 0.0,
        idempotency_key=idempotency_key,
    )


def _preferences(prefer: str) -> dict[str, str]:
    """The values of preferences by their names in lower case. The first of equal names counts (RFC 7240, section 2)."""
    preferences: dict[str, str] = {}
    for preference in parse_http_list(prefer):
        name, _, value = preference.partition(";")[0].partition("=")
        preferences.setdefault(name.strip().lower(), value.strip().strip('"'))
    return preferences


HeadersOfGeneration = Annotated[GenerationHeaders, Depends(_generation_headers)]
