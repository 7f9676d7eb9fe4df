"""Dependencies of the routes: the objects that belong to the application or to the HTTP request."""

from typing import Annotated

from fastapi import Depends, Request

from service.api.caller import Caller, caller_of
from service.api.links import Links, links_of
from service.keys import ApiKeys
from service.running.dispatcher import Dispatcher
from service.settings import Settings


def _dispatcher(request: Request) -> Dispatcher:
    dispatcher: Dispatcher = request.app.state.dispatcher
    return dispatcher


def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


def _api_keys(request: Request) -> ApiKeys:
    api_keys: ApiKeys = request.app.state.api_keys
    return api_keys


def _links(request: Request) -> Links:
    return links_of(request, _settings(request))


def _caller(request: Request) -> Caller:
    return caller_of(request.scope)


DispatcherOfApp = Annotated[Dispatcher, Depends(_dispatcher)]
SettingsOfApp = Annotated[Settings, Depends(_settings)]
ApiKeysOfApp = Annotated[ApiKeys, Depends(_api_keys)]
LinksOfRequest = Annotated[Links, Depends(_links)]
CallerOfRequest = Annotated[Caller, Depends(_caller)]
