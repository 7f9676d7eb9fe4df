"""A replica that runs one model: a dispatcher and its worker, in the event loop of the replica."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from service.app import build_dispatcher
from service.errors import Broken
from service.loading import load_models
from service.logging import configure_logging
from service.settings import Settings, load_settings

if TYPE_CHECKING:  # torch is imported where a model is loaded: not in Serve's controller, nor in replicas of the API
    from models.engine import Engine

LoadEngine = Callable[[Settings], "Engine"]


class ModelWorker:
    """Claims jobs from Redis. Serve starts, checks and stops it, and sends it no requests."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: dict[str, Any], load: LoadEngine = load_models
    ) -> None:
        """`settings` take precedence over the ELASTIC_ variables of the node."""
        own = load_settings(**settings)
        configure_logging(own.log_level, own.log_format)
        self._dispatcher = build_dispatcher(own, partial(load, own))
        await asyncio.to_thread(self._dispatcher.worker.start)  # loads the model, which may take minutes
        self._running = AsyncExitStack()
        await self._running.enter_async_context(self._dispatcher.running())

    def check_health(self) -> None:
        """Serve replaces a replica whose check fails three times."""
        if self._dispatcher.is_broken or not self._dispatcher.worker.is_alive:
            raise Broken("the worker has stopped; its log says why")

    async def __del__(self) -> None:
        """Finish the jobs that it holds within the grace period, and return the others to the queue.

        Serve awaits this before it ends the replica.
        """
        await self._running.aclose()
