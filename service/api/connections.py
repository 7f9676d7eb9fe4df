"""uvicorn with limits on connections: how many there are, and how long one may stand still.

uvicorn itself bounds neither the time of a request's headers nor that of an answer which the client does not read, and
its `limit_concurrency` counts requests, so that silent connections take all file descriptors.
"""

import asyncio
import errno
import logging
import resource
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.api.errors import status_and_error
from service.api.responses import ErrorBody
from service.errors import MalformedRequest, Overloaded
from service.settings import Settings

logger = logging.getLogger(__name__)

SEND_S = 10
"""How long uvicorn waits, after all jobs have ended, until clients have read their answers."""

_READ_BYTES = 8192
"""Bytes that are read at once, instead of 256 KiB: as chunks of one byte each, those keep h11 busy for a second."""

DRAIN_BYTES = 64_000_000
"""Bytes of a body that are read and dropped after its answer, so that the client gets to read the answer."""

_OTHER_FILES = 128
"""File descriptors for files, Redis and webhooks, generously."""

_LOG_INTERVAL_S = 60.0
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class ServerConfig(uvicorn.Config):
    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(
            app,
            host=settings.host,
            port=settings.port,
            loop="asyncio",
            http=BoundedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            # Without proxies in front, clients write these headers themselves; uvicorn believes all of 127.0.0.1.
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            timeout_graceful_shutdown=SEND_S,
        )
        self.max_connections = settings.max_connections
        self.header_timeout_s = settings.header_timeout_s
        self.send_timeout_s = settings.send_timeout_s
        self.body_timeout_s = settings.body_timeout_s


class BoundedServer(uvicorn.Server):
    config: ServerConfig

    async def startup(self, sockets: list[Any] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(ConnectionErrors().handle)
        num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if num_files < self.config.max_connections + _OTHER_FILES:
            logger.warning(
                "max_connections %d is too many for %d file descriptors; raise ulimit -n, or lower it to %d",
                *(self.config.max_connections, num_files, max(1, num_files - _OTHER_FILES)),
            )
        await super().startup(sockets)


class BoundedProtocol(H11Protocol):
    """One connection. It is closed if a request's headers or the client's reading of an answer take too long.

    Where there are too many connections, a new one takes the place of the one that has waited longest for a request.
    If all are at work, the new one is refused. Errors that are found here have the shape of all others.

    An answer may come before its request's body. To close the connection then would reset it, and the client could lose
    the answer while it still sends. So the rest of the body is read and dropped, up to `DRAIN_BYTES` and for
    `body_timeout_s`.
    """

    config: ServerConfig
    connections: set["BoundedProtocol"]  # type: ignore[assignment]  # uvicorn names all of its own protocols
    _waiting_since = 0.0
    _head_timer: asyncio.TimerHandle | None = None
    _send_timer: asyncio.TimerHandle | None = None
    _drain_timer: asyncio.TimerHandle | None = None
    _bytes_to_drain = DRAIN_BYTES

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]  # of asyncio's transports for sockets
        self._transport_of_answers = _TransportOfAnswers(self)
        self._wait_for_head()
        self._make_room()

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None:
            self.cycle.transport = self._transport_of_answers  # type: ignore[assignment]  # has all that it calls

    def data_received(self, data: bytes) -> None:
        if self._drain_timer is not None:
            self._drain(len(data))
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
        elif self._head_timer is None:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_send_timer()
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        self._stop_send_timer()
        super().resume_writing()

    def on_response_complete(self) -> None:
        self._waiting_since = self.loop.time()
        self._watch_sending()
        super().on_response_complete()
        if self._drain_timer is not None:
            self._unset_keepalive_if_required()

    def close_after_answer(self) -> None:
        """Close the connection now, or once the client has stopped sending its body."""
        if self.conn.their_state is not h11.SEND_BODY:
            self.transport.close()
            return
        self.transport.write_eof()  # tells the client that no other answer comes
        self._drain_timer = self.loop.call_later(self.config.body_timeout_s, self.transport.close)

    def _drain(self, num_bytes: int) -> None:
        self._bytes_to_drain -= num_bytes
        if self._bytes_to_drain < 0:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(MalformedRequest("the request is not valid HTTP/1.1, or its headers are longer than 64 KiB"))

    @property
    def _is_idle(self) -> bool:
        is_answered = self.cycle is None or self.cycle.response_complete
        return is_answered and not self.transport.is_closing() and not self.transport.get_write_buffer_size()

    def _make_room(self) -> None:
        if len(self.connections) <= self.config.max_connections:
            return
        others = [other for other in self.connections if other is not self and not other.transport.is_closing()]
        if len(others) < self.config.max_connections:
            return
        idle = [other for other in others if other._is_idle]
        if idle:
            min(idle, key=lambda other: other._waiting_since).transport.close()
        else:
            self._refuse(Overloaded(f"the server has {len(others)} connections, its limit", retry_after_s=1))

    def _wait_for_head(self) -> None:
        self._waiting_since = self.loop.time()
        self._head_timer = self.loop.call_later(self.config.header_timeout_s, self._end_waiting)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_waiting(self) -> None:
        has_begun = bool(self.conn.trailing_data[0])
        if has_begun and self.conn.our_state is h11.IDLE:
            limit = f"{self.config.header_timeout_s:g} s, the limit of this server"
            self._refuse(HTTPException(408, f"the request's headers have not arrived within {limit}"))
        else:
            self.transport.close()

    def _watch_sending(self) -> None:
        unsent = self.transport.get_write_buffer_size()
        if unsent and self._send_timer is None:
            self._send_timer = self.loop.call_later(self.config.send_timeout_s, self._check_sending, unsent)

    def _stop_send_timer(self) -> None:
        if self._send_timer is not None:
            self._send_timer.cancel()
            self._send_timer = None

    def _check_sending(self, unsent_before: int) -> None:
        """Drop the connection if the client has read nothing since the last check."""
        self._send_timer = None
        if self.transport.get_write_buffer_size() < unsent_before:
            self._watch_sending()
        else:
            self.transport.abort()

    def _refuse(self, error: Exception) -> None:
        """Answer `error`, unless an answer has begun, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            status, detail = status_and_error(error)
            body = ErrorBody(error=detail).model_dump_json().encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            if isinstance(error, Overloaded):
                headers["Retry-After"] = str(error.retry_after_s)
            for event in (
                h11.Response(status_code=status, headers=list(headers.items())),
                h11.Data(body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _TransportOfAnswers:
    """The transport of a connection, as far as uvicorn's answers call it."""

    def __init__(self, connection: BoundedProtocol) -> None:
        self._connection = connection

    def write(self, data: bytes) -> None:
        self._connection.transport.write(data)

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def close(self) -> None:
        self._connection.close_after_answer()


class ConnectionErrors:
    """Logs the errors that asyncio reports: one of each type a minute, since clients may cause them over and over.

    While there are no file descriptors for new connections, asyncio reports thousands of errors each second.
    """

    def __init__(self) -> None:
        self._logged_at: dict[tuple[type | None, int | None], float] = {}

    def handle(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        number = error.errno if isinstance(error, OSError) else None
        kind = type(error), number
        if loop.time() - self._logged_at.get(kind, float("-inf")) < _LOG_INTERVAL_S:
            return
        self._logged_at[kind] = loop.time()
        if number in _OUT_OF_RESOURCES:
            logger.error("new connections have to wait: %s; raise ulimit -n, or lower max_connections", error)
        else:
            loop.default_exception_handler(context)
