"""What routes get from the app that they are in."""

from typing import Annotated

from fastapi import Depends, Request

from service.running.dispatcher import Dispatcher
from service.settings import Settings


def _dispatcher(request: Request) -> Dispatcher:
    dispatcher: Dispatcher = request.app.state.dispatcher
    return dispatcher


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


DispatcherOfApp = Annotated[Dispatcher, Depends(_dispatcher)]
SettingsOfApp = Annotated[Settings, Depends(_settings)]
