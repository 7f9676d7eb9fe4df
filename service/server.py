"""uvicorn with draining: after SIGTERM it continues to answer until the accepted jobs are finished."""

import asyncio
import signal
import socket

from fastapi import FastAPI

from service.api.connections import BoundedServer, ServerConfig
from service.errors import BadConfiguration, Broken
from service.running.dispatcher import Dispatcher
from service.settings import Settings


class DrainingServer(BoundedServer):
    """Exits when its dispatcher has drained, which begins after a signal, or when the dispatcher or worker broke."""

    def __init__(self, config: ServerConfig, dispatcher: Dispatcher) -> None:
        super().__init__(config)
        self._dispatcher = dispatcher
        self._draining: asyncio.Task[None] | None = None

    async def on_tick(self, counter: int) -> bool:
        """Whether to exit; uvicorn calls this ten times a second."""
        wants_exit = await super().on_tick(counter) or self._dispatcher.is_broken
        if wants_exit and self._draining is None:
            self._draining = asyncio.create_task(self._dispatcher.drain())
        return self.force_exit or (self._draining is not None and self._draining.done())


def check_address(host: str, port: int) -> None:
    """Raise BadConfiguration unless a server could listen on all addresses of `host` at this port."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in addresses:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as asyncio does
                if family is socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        raise BadConfiguration(f"can't listen on {host} port {port}: {error.strerror}") from error


def serve(settings: Settings, app: FastAPI, dispatcher: Dispatcher) -> None:
    """Answer on `settings.host` and `settings.port` until SIGTERM or SIGINT. The worker has been started.

    Raises Broken if the server ends for another reason, which the log has.
    """
    # uvicorn raises the signal again after its shutdown, when it no longer matters.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = DrainingServer(ServerConfig(app, settings), dispatcher)
    server.run()
    if dispatcher.is_broken or server.lifespan.error_occurred or server.lifespan.shutdown_failed:
        raise Broken("the server has stopped because a part of it failed; the log says which")
