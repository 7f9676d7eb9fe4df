"""uvicorn, taught to drain: after SIGTERM it goes on answering until what was accepted has been finished."""

import asyncio
import signal

import uvicorn
from fastapi import FastAPI

from service.running.dispatcher import Dispatcher
from service.settings import Settings

# How long uvicorn waits, once all jobs have ended, for their answers to be read.
SEND_S = 10


class DrainingServer(uvicorn.Server):
    """Exits when its dispatcher has drained: after a signal, within the grace; or at once, if the worker broke."""

    def __init__(self, config: uvicorn.Config, dispatcher: Dispatcher) -> None:
        super().__init__(config)
        self._dispatcher = dispatcher
        self._draining: asyncio.Task[None] | None = None

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to exit."""
        wants_exit = await super().on_tick(counter) or not self._dispatcher.worker.is_alive
        if wants_exit and self._draining is None:
            self._draining = asyncio.create_task(self._dispatcher.drain())
        return self.force_exit or self._dispatcher.has_drained.is_set()


def serve(settings: Settings, app: FastAPI, dispatcher: Dispatcher) -> None:
    """Answer on `settings.host` and `settings.port` until SIGTERM or SIGINT. The worker has been started."""
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SEND_S,
    )
    # uvicorn raises the signal once more when it has shut down; by then it has been obeyed.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    DrainingServer(config, dispatcher).run()
