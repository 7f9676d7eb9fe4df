"""What routes get from the app that they are in."""

from typing import Annotated

from fastapi import Depends, Request

from service.settings import Settings
from service.worker import Worker


def _worker(request: Request) -> Worker:
    worker: Worker = request.app.state.worker
    return worker


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


WorkerOfApp = Annotated[Worker, Depends(_worker)]
SettingsOfApp = Annotated[Settings, Depends(_settings)]
