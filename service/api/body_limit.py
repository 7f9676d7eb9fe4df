"""Limits on the size of request bodies, and on the time that they take to arrive."""

import asyncio
from dataclasses import dataclass

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
        self.num_held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if "content-length" in headers and "transfer-encoding" in headers:
            await self._refuse(scope, receive, send)
            return
        declared = headers.get("content-length", "")
        body = _Body(
            limits=self,
            receive_any=receive,
            send_any=send,
            max_bytes=self._limit_of(scope),
            num_declared=int(declared) if declared.isdecimal() else 0,
            is_chunked="transfer-encoding" in headers,
        )
        try:
            await self.app(scope, body.receive, body.send)
        finally:
            self.num_held_bytes -= body.num_received

    def hold(self, num_bytes: int) -> None:
        """Count bytes until their request is answered. Raises HTTPException if all requests have too many."""
        self.num_held_bytes += num_bytes
        if self.num_held_bytes > self.settings.max_held_body_bytes:
            raise HTTPException(503, "the server holds as many bytes of requests as it can", {"Retry-After": "1"})

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse two lengths of one body: a proxy in front may have believed the other one (RFC 9112, section 6.1)."""
        error = MalformedRequest("the request has Content-Length and Transfer-Encoding; send one of the two")
        response = await answer_error(Request(scope), error)
        response.headers["Connection"] = "close"
        await response(scope, receive, send)

    def _limit_of(self, scope: Scope) -> int:
        access = access_of(scope)
        return default_max_body_bytes(self.settings) if access is None else access.max_body_bytes(self.settings)


@dataclass(slots=True)
class _Body:
    """The body of one request, as it arrives."""

    limits: BodyLimit
    receive_any: Receive
    send_any: Send
    max_bytes: int
    num_declared: int
    is_chunked: bool
    num_received: int = 0
    is_read: bool = False
    deadline: float | None = None

    def __post_init__(self) -> None:
        if self.num_declared > 0 or self.is_chunked:
            self.deadline = asyncio.get_running_loop().time() + self.limits.settings.body_timeout_s

    async def receive(self) -> Message:
        if self.num_declared > self.max_bytes:
            raise _too_large(self.max_bytes)
        try:
            async with asyncio.timeout_at(self.deadline):
                message = await self.receive_any()
        except TimeoutError as error:
            raise _too_slow(self.limits.settings.body_timeout_s) from error
        if not message.get("more_body", False):
            self.is_read = True
            self.deadline = None  # the next message is the client's disconnecting, which may come at any time
        num_bytes = len(message.get("body", b""))
        self.num_received += num_bytes
        self.limits.hold(num_bytes)
        if self.num_received > self.max_bytes:
            raise _too_large(self.max_bytes)
        return message

    async def send(self, message: Message) -> None:
        may_be_long = max(self.num_declared, self.num_received) > self.max_bytes or self.is_chunked
        if message["type"] == "http.response.start" and may_be_long and not self.is_read:
            MutableHeaders(scope=message)["Connection"] = "close"  # otherwise uvicorn reads the whole body
        await self.send_any(message)


def _too_large(limit: int) -> HTTPException:
    return _closing(413, f"the body is larger than {limit} bytes, the limit of this server")


def _too_slow(timeout_s: float) -> HTTPException:
    return _closing(408, f"the body has not arrived within {timeout_s:g} s, the limit of this server")


def _closing(status: int, message: str) -> HTTPException:
    """An error after which the connection is closed; on a connection that stays, uvicorn reads the rest of the body."""
    return HTTPException(status, message, headers={"Connection": "close"})
