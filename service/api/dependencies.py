"""Dependencies of the routes: the objects that belong to the application or to the HTTP request."""

from typing import Annotated

from fastapi import Depends, Request

from service.api.caller import Caller, caller_of
from service.running.dispatcher import Dispatcher
from service.settings import Settings


def _dispatcher(request: Request) -> Dispatcher:
    dispatcher: Dispatcher = request.app.state.dispatcher
    return dispatcher


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _caller(request: Request) -> Caller:
    return caller_of(request.scope)


DispatcherOfApp = Annotated[Dispatcher, Depends(_dispatcher)]
SettingsOfApp = Annotated[Settings, Depends(_settings)]
CallerOfRequest = Annotated[Caller, Depends(_caller)]
