"""Runs a server or a worker in this process."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from fastapi import FastAPI

from service.app import build_dispatcher
from service.installation import INSTALLATION
from service.loading import load_model, load_models
from service.running.dispatcher import Dispatcher
from service.running.model_changes import ModelChanges
from service.server import check_address, serve
from service.settings import Settings


def run_server(settings: Settings, create: Callable[[Settings, Dispatcher, ModelChanges | None], FastAPI]) -> None:
    """Load the models, unless the server has no worker, and answer with the application that `create` makes."""
    directories = settings.model_directories if settings.worker else ()
    check_address(settings.host, settings.port)  # loading the models may take minutes
    if not settings.worker:
        dispatcher = build_dispatcher(settings)
        serve(settings, create(settings, dispatcher, None), dispatcher)
        return
    from models.zoo import model_directories  # imports torch, so only where models run

    def loadable() -> dict[str, Path]:
        return {path.name: path for path in (*directories, *model_directories(INSTALLATION / "checkpoints"))}

    dispatcher = build_dispatcher(settings, partial(load_models, settings, directories))
    changes = ModelChanges(dispatcher, loadable, partial(load_model, settings))
    web = create(settings, dispatcher, changes)  # before the models load, to report a bad configuration at once
    dispatcher.worker.start()
    serve(settings, web, dispatcher)
