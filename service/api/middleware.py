"""What happens around every HTTP request: its id, and the limit on its body."""

import re
import uuid
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Printable ASCII; a longer or stranger id is replaced, so that logs stay readable.
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# W3C Trace Context, section 3.2: version, trace id, parent id, flags.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


def request_id_of(headers: Headers) -> str:
    """The client's `X-Request-ID`, else its trace id, else a new one."""
    if (given := _REQUEST_ID.fullmatch(headers.get("x-request-id", ""))) is not None:
        return given[0]
    if (trace := _TRACEPARENT.fullmatch(headers.get("traceparent", ""))) is not None:
        return trace[1]
    return uuid.uuid4().hex


class RequestId:
    """Put the request's id into `request.state.request_id` and into the response's `X-Request-ID`."""

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

        await self.app(scope, receive, send_with_id)


class BodyLimit:
    """Stop reading a body that is longer than `max_body_bytes`, or what `of_paths` says of its path.

    FastAPI has such a limit too, but answers it as plain text, outside our error handlers.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, of_paths: Mapping[str, int]) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.of_paths = of_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.of_paths.get(scope["path"], self.max_body_bytes)
        declared = Headers(scope=scope).get("content-length", "")
        num_bytes = int(declared) if declared.isdecimal() else 0
        is_declared = num_bytes > 0

        async def receive_within_limit() -> Message:
            nonlocal num_bytes
            if num_bytes > limit:
                raise _too_large(limit)
            message = await receive()
            if message["type"] == "http.request" and not is_declared:
                num_bytes += len(message.get("body", b""))
                if num_bytes > limit:
                    raise _too_large(limit)
            return message

        await self.app(scope, receive_within_limit, send)


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limit} bytes, the limit of this server")
