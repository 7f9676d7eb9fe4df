"""uvicorn, taught to drain: after SIGTERM it goes on answering until what was accepted has been finished."""

import signal
from threading import Thread

import uvicorn

from service.app import create_app
from service.settings import Settings
from service.worker import Worker

# How long uvicorn waits, once all jobs have ended, for their answers to be read.
SEND_S = 10


class DrainingServer(uvicorn.Server):
    """Exits when its worker has ended: after a signal, within the grace; or at once, if the worker broke."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self._worker = worker
        self._stopping: Thread | None = None

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to exit."""
        wants_exit = await super().on_tick(counter) or not self._worker.is_alive
        if wants_exit and self._stopping is None:
            self._stopping = Thread(target=self._worker.stop, name="stopping", daemon=True)
            self._stopping.start()
        return self.force_exit or (self._stopping is not None and not self._stopping.is_alive())


def serve(settings: Settings, worker: Worker) -> None:
    """Answer on `settings.host` and `settings.port` until SIGTERM or SIGINT. `worker` has been started."""
    config = uvicorn.Config(
        create_app(settings, worker),
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
    DrainingServer(config, worker).run()
