"""The id of an HTTP request, and the line that the log gets about it."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.caller import Caller, caller_of, set_caller
from service.logging import current_request_id

logger = logging.getLogger(__name__)

# Printable ASCII. Any other id is replaced, so that logs stay readable.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# W3C Trace Context, section 3.2: version, trace id, parent id, flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def request_id_of(headers: Headers) -> str:
    """The client's `X-Request-ID`, else its trace id, else a new id."""
    if (given := _REQUEST_ID.fullmatch(headers.get("x-request-id", ""))) is not None:
        return given[0]
    if (trace := _TRACEPARENT.fullmatch(headers.get("traceparent", ""))) is not None:
        return trace[1]
    return uuid.uuid4().hex


class RequestId:
    """Create the request's `Caller`; put its request id into every log line and into the response's `X-Request-ID`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope))
        set_caller(scope, Caller(request_id))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        # Never reset: every request has a task of its own, and uvicorn may log more in it later.
        current_request_id.set(request_id)
        await self.app(scope, receive, send_with_id)


class AccessLog:
    """Log one line for each answered request. uvicorn's own line has the query, which may hold secrets."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500  # unless it gets as far as an answer

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            caller = caller_of(scope)
            line = {
                "method": scope["method"],
                "route": getattr(scope.get("route"), "path", "unknown"),
                "status": status,
                "seconds": round(time.perf_counter() - began, 6),
                "key_id": caller.owner,
                "job_id": caller.job_id,
            }
            logger.info(
                "%s %s %d in %.3f s key=%s",
                *(line[name] for name in ("method", "route", "status", "seconds", "key_id")),
                extra=line,
            )
