"""The route class and the headers that all generation endpoints share."""

import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from models.errors import InvalidRequest, UnknownModel
from service.api.caller import caller_of
from service.api.errors import status_and_error
from service.errors import ServiceError, UnsupportedMediaType
from service.running.dispatcher import Dispatcher

_WAIT = re.compile(r"wait\s*=\s*([0-9]{1,6})", re.ASCII)


class GenerationRoute(APIRoute):
    """A route that takes a JSON body, and counts the requests that it refuses before a job exists."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle_route = super().get_route_handler()

        async def handle_generation(request: Request) -> Response:
            try:
                return await handle_route(await self.as_json(request))
            except (ServiceError, InvalidRequest, UnknownModel, RequestValidationError, HTTPException) as error:
                caller = caller_of(request.scope)
                if caller.job_id is None:
                    dispatcher: Dispatcher = request.app.state.dispatcher
                    dispatcher.metrics.observe_rejection(caller.model, status_and_error(error)[1].code)
                raise

        return handle_generation

    async def as_json(self, request: Request) -> Request:
        """The request with a JSON body. Raises UnsupportedMediaType for a body of another type."""
        if media_type_of(request) != "application/json":
            raise UnsupportedMediaType(f"the body is '{media_type_of(request)}'; send it as application/json")
        return request


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
    preference = (prefer or "").lower()
    wait = _WAIT.search(preference)
    return GenerationHeaders(
        is_async="respond-async" in preference,
        wait_s=float(wait[1]) if wait else 0.0,
        idempotency_key=idempotency_key,
    )


HeadersOfGeneration = Annotated[GenerationHeaders, Depends(_generation_headers)]
