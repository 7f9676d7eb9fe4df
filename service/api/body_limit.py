"""Limits on the size of request bodies, and on the time that they take to arrive."""

import asyncio

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.access import access_of, default_max_body_bytes
from service.api.errors import answer_error
from service.errors import MalformedRequest
from service.settings import Settings


class BodyLimit:
    """Stop reading a body that is longer than its route allows, or that takes longer than `body_timeout_s` in all.

    What arrives is counted, whatever the headers say.
    The time limit is on the whole body, so a client cannot prolong it by sending single bytes. The server closes the
    connection of a body that it refuses, and of a long body that no route has read: keeping the connection would mean
    reading that body to its end. FastAPI has a size limit too, but answers in plain text, outside our error handlers.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:
            await self._refuse(scope, receive, send)
            return
        limit, timeout_s = self._limit_of(scope), self.settings.body_timeout_s
        declared = headers.get("content-length", "")
        num_declared, num_received = int(declared) if declared.isdecimal() else 0, 0
        is_read = False
        deadline: float | None = None
        if num_declared > 0 or "transfer-encoding" in headers:
            deadline = asyncio.get_running_loop().time() + timeout_s

        async def receive_within_limit() -> Message:
            nonlocal num_received, deadline, is_read
            if num_declared > limit:
                raise _too_large(limit)
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                raise _too_slow(timeout_s) from error
            if not message.get("more_body", False):
                is_read = True
                deadline = None  # the next message is the client's disconnecting, which may come at any time
            if message["type"] == "http.request":
                num_received += len(message.get("body", b""))
                if num_received > limit:
                    raise _too_large(limit)
            return message

        async def send_and_close(message: Message) -> None:
            may_be_long = max(num_declared, num_received) > limit or "transfer-encoding" in headers
            if message["type"] == "http.response.start" and may_be_long and not is_read:
                MutableHeaders(scope=message)["Connection"] = "close"  # otherwise uvicorn reads the whole body
            await send(message)

        await self.app(scope, receive_within_limit, send_and_close)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse two lengths of one body: a proxy in front may have believed the other one (RFC 9112, section 6.1)."""
        error = MalformedRequest("the request has Content-Length and Transfer-Encoding; send one of the two")
        response = await answer_error(Request(scope), error)
        response.headers["Connection"] = "close"
        await response(scope, receive, send)

    def _limit_of(self, scope: Scope) -> int:
        access = access_of(scope)
        return default_max_body_bytes(self.settings) if access is None else access.max_body_bytes(self.settings)


def _too_large(limit: int) -> HTTPException:
    return _closing(413, f"the body is larger than {limit} bytes, the limit of this server")


def _too_slow(timeout_s: float) -> HTTPException:
    return _closing(408, f"the body has not arrived within {timeout_s:g} s, the limit of this server")


def _closing(status: int, message: str) -> HTTPException:
    """An error after which the connection is closed; on a connection that stays, uvicorn reads the rest of the body."""
    return HTTPException(status, message, headers={"Connection": "close"})
