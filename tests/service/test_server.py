"""The server process around an application, run in the main thread as the command line does."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from service.app import create_app, create_worker_app
from service.errors import Broken
from service.jobs.job import Job
from service.running.dispatcher import Dispatcher
from service.server import serve
from service.settings import Settings

Create = Callable[[Settings, Dispatcher], FastAPI]
MakeDispatcher = Callable[[Settings], Dispatcher]
SETTINGS = Settings(port=0, grace_s=0)


@pytest.fixture(autouse=True)
def signal_handlers() -> Iterator[None]:
    """A server ignores signals once it has begun to drain; the tests' process should not."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stop_soon(dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send SIGTERM to the server as it starts."""
    open_store = dispatcher.store.open

    async def open_and_stop(**callbacks: Any) -> None:
        await open_store(**callbacks)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(dispatcher.store, "open", open_and_stop)


async def fail(*_: object, **__: object) -> None:
    raise ZeroDivisionError


def test_server_that_is_told_to_stop_ends_without_an_error(
    make_dispatcher: MakeDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = make_dispatcher(SETTINGS)
    stop_soon(dispatcher, monkeypatch)
    serve(SETTINGS, create_app(SETTINGS, dispatcher), dispatcher)
    assert dispatcher.has_drained.is_set()


@pytest.mark.parametrize("create", [create_app, create_worker_app])
@pytest.mark.parametrize("operation", ["claim", "renew"])
def test_server_whose_dispatcher_fails_ends_with_an_error(
    operation: str, create: Create, make_dispatcher: MakeDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = make_dispatcher(SETTINGS)
    monkeypatch.setattr(dispatcher.store, operation, fail)
    with pytest.raises(Broken):
        serve(SETTINGS, create(SETTINGS, dispatcher), dispatcher)


def test_server_whose_worker_fails_ends_with_an_error(
    make_dispatcher: MakeDispatcher, make_job: Callable[..., Job], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "memory_bytes", lambda: 1 / 0)
    dispatcher = make_dispatcher(SETTINGS)
    asyncio.run(dispatcher.store.add(make_job("a")))
    with pytest.raises(Broken):
        serve(SETTINGS, create_app(SETTINGS, dispatcher), dispatcher)


def test_server_that_fails_while_it_drains_ends_with_an_error(
    make_dispatcher: MakeDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = make_dispatcher(SETTINGS)
    monkeypatch.setattr(dispatcher.store, "claim", fail)
    monkeypatch.setattr(dispatcher.store, "live_jobs", fail)
    with pytest.raises(Broken):
        serve(SETTINGS, create_app(SETTINGS, dispatcher), dispatcher)


def test_server_that_fails_at_its_end_ends_with_an_error(
    make_dispatcher: MakeDispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatcher = make_dispatcher(SETTINGS)
    stop_soon(dispatcher, monkeypatch)
    monkeypatch.setattr(dispatcher.store, "close", fail)
    with pytest.raises(Broken):
        serve(SETTINGS, create_app(SETTINGS, dispatcher), dispatcher)
