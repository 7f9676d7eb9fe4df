"""Loads models into a running worker, and unloads them."""

import asyncio
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import GenerationError, UnknownModel
from service.errors import ModelNotLoadable
from service.running.dispatcher import Dispatcher

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine

_LOOK_S = 0.05
"""How often a model that is to be unloaded is looked at, while it has jobs."""


class ModelStatus(StrEnum):
    LOADED = "loaded"  # the worker takes its jobs
    LOADING = "loading"
    UNLOADING = "unloading"  # its jobs come to their end, and the worker takes no more of them
    AVAILABLE = "available"  # it could be loaded


class ModelChanges:
    """Used in the dispatcher's event loop. One change is made after the other.

    `find` has the directories that may be loaded, by id. `load` reads the weights of one, in a thread beside the
    worker's; the function that it returns adds the model to an engine, in the worker's own thread.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        find: Callable[[], Mapping[str, Path]],
        load: "Callable[[Path], Callable[[Engine], None]]",
    ) -> None:
        self._dispatcher = dispatcher
        self._find = find
        self._load = load
        self._lock = asyncio.Lock()
        self._under_way: dict[str, ModelStatus] = {}

    async def statuses(self) -> dict[str, ModelStatus]:
        """All models that are loaded or could be."""
        available = dict.fromkeys(await asyncio.to_thread(self._find), ModelStatus.AVAILABLE)
        loaded = dict.fromkeys(self._dispatcher.worker.cards, ModelStatus.LOADED)
        return available | loaded | self._under_way

    async def load(self, model: str) -> None:
        """Return when the worker takes jobs of `model`; at once if it does so.

        Steps go on while the weights are read, and pause while the model is measured. Raises UnknownModel,
        ModelNotLoadable, and Draining if the worker ends first.
        """
        self._dispatcher.check_accepting()
        directories = await asyncio.to_thread(self._find)
        async with self._lock:
            if model in self._dispatcher.worker.cards:
                return
            if model not in directories:
                raise UnknownModel(f"there is no model '{model}' to load; there are: {', '.join(directories)}")
            self._under_way[model] = ModelStatus.LOADING
            try:
                add = await asyncio.to_thread(self._load, directories[model])
                await asyncio.wrap_future(self._dispatcher.worker.change_models(add))
            except (GenerationError, OSError) as error:  # a broken directory, or too little memory
                raise ModelNotLoadable(f"model '{model}' can't be loaded: {error}") from error
            finally:
                del self._under_way[model]
        self._dispatcher.announce_soon()

    async def unload(self, model: str) -> None:
        """Return when the memory of `model` is free. Its running jobs end first, and the worker takes no more of it.

        Jobs that wait for the model stay queued. Raises UnknownModel if it is not loaded, and Draining if the worker
        ends first.
        """
        self._dispatcher.check_accepting()
        worker = self._dispatcher.worker
        async with self._lock:
            if model not in worker.cards:
                raise UnknownModel(f"model '{model}' is not loaded; loaded: {', '.join(worker.cards) or 'none'}")
            self._under_way[model] = ModelStatus.UNLOADING
            try:
                async with self._dispatcher.claiming:  # no job of it is on its way to the worker
                    worker.withhold(model)
                self._dispatcher.announce_soon()
                while worker.is_alive and self._dispatcher.num_running()[model]:
                    await asyncio.sleep(_LOOK_S)
                await asyncio.wrap_future(worker.change_models(lambda engine: engine.remove(model)))
            finally:
                del self._under_way[model]
