"""What happens around every HTTP request: its id, its line in the log, headers, and the limits on its body."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.logging import current_request_id

logger = logging.getLogger(__name__)

# Printable ASCII; a longer or stranger id is replaced, so that logs stay readable.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# W3C Trace Context, section 3.2: version, trace id, parent id, flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
# FastAPI's page has a script and styles inline. A page that can do with less sends a policy of its own.
_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
# Everything else is data: should a browser ever show it as a page, that page can do nothing.
_DATA_POLICY = "default-src 'none'; frame-ancestors 'none'"


def request_id_of(headers: Headers) -> str:
    """The client's `X-Request-ID`, else its trace id, else a new one."""
    if (given := _REQUEST_ID.fullmatch(headers.get("x-request-id", ""))) is not None:
        return given[0]
    if (trace := _TRACEPARENT.fullmatch(headers.get("traceparent", ""))) is not None:
        return trace[1]
    return uuid.uuid4().hex


class RequestId:
    """Put the request's id into `request.state.request_id`, every log line, and the response's `X-Request-ID`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = request_id_of(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        # Never reset: every request has a task of its own, in which uvicorn may have more to log about it.
        current_request_id.set(request_id)
        await self.app(scope, receive, send_with_id)


class AccessLog:
    """One line for each request when it has been answered, instead of uvicorn's, which has the query."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500  # what Starlette answers, outside of this, when there was a bug

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        finally:
            key = scope.get("state", {}).get("key")
            line = {
                "method": scope["method"],
                "route": getattr(scope.get("route"), "path", "unknown"),
                "status": status,
                "seconds": round(time.perf_counter() - began, 6),
                "key_id": None if key is None else key.id,
                "job_id": scope.get("state", {}).get("job_id"),
            }
            logger.info(
                "%s %s %d in %.3f s key=%s",
                *(line[name] for name in ("method", "route", "status", "seconds", "key_id")),
                extra=line,
            )


class SecurityHeaders:
    """Tell browsers what not to do with an answer. Headers that a route has set itself stay."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_securely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                is_page = headers.get("content-type", "").startswith("text/html")
                headers.setdefault("Content-Security-Policy", _PAGE_POLICY if is_page else _DATA_POLICY)
                if scope["path"].startswith("/v1/"):  # what somebody made is nobody else's
                    headers.setdefault("Cache-Control", "no-store")
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_securely)


class BodyLimit:
    """Stop reading a body that is longer than `max_body_bytes`, or what `of_paths` says of its path, or too slow.

    The whole body has to arrive within `timeout_s`, however steadily it drips. What is refused is not read to its end,
    nor is a long body that was answered without being read: the connection is closed. FastAPI has a limit of size too,
    but answers it as plain text, outside our error handlers.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, of_paths: Mapping[str, int], timeout_s: float) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.of_paths = of_paths
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.of_paths.get(scope["path"], self.max_body_bytes)
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        num_bytes = int(declared) if declared.isdecimal() else 0
        is_declared = num_bytes > 0
        is_read = False
        deadline: float | None = None
        if is_declared or "transfer-encoding" in headers:
            deadline = asyncio.get_running_loop().time() + self.timeout_s

        async def receive_within_limit() -> Message:
            nonlocal num_bytes, deadline, is_read
            if num_bytes > limit:
                raise _too_large(limit)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise _too_slow(self.timeout_s) from error
            if not message.get("more_body", False):
                is_read = True
                deadline = None  # what comes next is the client's hanging up, which has time
            if message["type"] == "http.request" and not is_declared:
                num_bytes += len(message.get("body", b""))
                if num_bytes > limit:
                    raise _too_large(limit)
            return message

        async def send_and_close(message: Message) -> None:
            may_be_long = num_bytes > limit or "transfer-encoding" in headers
            if message["type"] == "http.response.start" and may_be_long and not is_read:
                MutableHeaders(scope=message)["Connection"] = "close"  # else uvicorn reads the body to its end
            await send(message)

        await self.app(scope, receive_within_limit, send_and_close)


def _too_large(limit: int) -> HTTPException:
    return _closing(413, f"the body is larger than {limit} bytes, the limit of this server")


def _too_slow(timeout_s: float) -> HTTPException:
    return _closing(408, f"the body has not arrived within {timeout_s:g} s, the limit of this server")


def _closing(status: int, message: str) -> HTTPException:
    """uvicorn would read the rest of the body, to its end, if it were to keep the connection."""
    return HTTPException(status, message, headers={"Connection": "close"})
