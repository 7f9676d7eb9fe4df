"""uvicorn with draining: after SIGTERM it continues to answer until the accepted jobs are finished."""

import asyncio
import signal

from fastapi import FastAPI

from service.api.connections import BoundedServer, ServerConfig
from service.running.dispatcher import Dispatcher
from service.settings import Settings


class DrainingServer(BoundedServer):
    """Exits when its dispatcher has drained, which begins after a signal, or when the worker has stopped."""

    def __init__(self, config: ServerConfig, dispatcher: Dispatcher) -> None:
        super().__init__(config)
        self._dispatcher = dispatcher
        self._draining: asyncio.Task[None] | None = None

    async def on_tick(self, counter: int) -> bool:
        """Whether to exit; uvicorn calls this ten times a second."""
        wants_exit = await super().on_tick(counter) or not self._dispatcher.worker.is_alive
        if wants_exit and self._draining is None:
            self._draining = asyncio.create_task(self._dispatcher.drain())
        return self.force_exit or self._dispatcher.has_drained.is_set()


def serve(settings: Settings, app: FastAPI, dispatcher: Dispatcher) -> None:
    """Answer on `settings.host` and `settings.port` until SIGTERM or SIGINT. The worker has been started."""
    # uvicorn raises the signal again after its shutdown, when it no longer matters.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    DrainingServer(ServerConfig(app, settings), dispatcher).run()
