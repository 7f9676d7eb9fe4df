"""A small application inside the real middlewares, so that they are tested without a worker."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from threading import Thread
from typing import Annotated, Any

import pytest
from fastapi import Body, Depends, FastAPI
from fastapi.testclient import TestClient
from starlette.responses import HTMLResponse, Response

from service.api.access import Access
from service.api.connections import BoundedServer, ServerConfig
from service.api.dependencies import CallerOfRequest
from service.api.errors import add_error_handlers
from service.api.middlewares import Middlewares
from service.app import create_app
from service.keys import Scope
from service.running.dispatcher import Dispatcher
from service.settings import Settings


@pytest.fixture
def rejections() -> list[str]:
    """The error codes of the requests that a small application refused before they reached a route."""
    return []


@pytest.fixture
def build_small_app(rejections: list[str]) -> Callable[[Settings], FastAPI]:
    def build(settings: Settings) -> FastAPI:
        middlewares = Middlewares(settings)

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            await middlewares.close()

        app = FastAPI(lifespan=lifespan, telemetry=middlewares.telemetry, redirect_slashes=False)

        @app.post("/v1/images/generations", dependencies=[Depends(Access(Scope.GENERATE, is_rate_limited=True))])
        async def create_image(caller: CallerOfRequest, body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
            caller.job_id = "job_1"
            if body["prompt"] == "break":
                raise RuntimeError("a bug")
            return {"created": 1, "data": [{"b64_json": "AA=="}]}

        @app.get("/v1/jobs/{job_id}", dependencies=[Depends(Access(Scope.GENERATE))])
        async def show_job(job_id: str, caller: CallerOfRequest) -> dict[str, Any]:
            return {"id": job_id, "key": caller.owner}

        @app.get("/metrics", dependencies=[Depends(Access(Scope.METRICS))])
        async def show_metrics() -> str:
            return ""

        @app.get("/healthz")
        async def check_health() -> str:
            return "ok"

        @app.get("/page")
        async def show_page() -> HTMLResponse:
            return HTMLResponse("<p>page</p>", headers={"Referrer-Policy": "origin"})

        @app.get("/large")
        async def show_file() -> Response:
            return Response(bytes(20_000_000))

        middlewares.add_to(app, rejections.append)
        add_error_handlers(app)
        return app

    return build


@pytest.fixture
def small(build_small_app: Callable[[Settings], FastAPI]) -> Iterator[TestClient]:
    with TestClient(build_small_app(Settings(max_body_bytes=20_000)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def listen(build_small_app: Callable[[Settings], FastAPI]) -> Iterator[Callable[[Settings], socket.socket]]:
    """Serve a small application on a real socket, and connect to it."""
    with contextlib.ExitStack() as stack:

        def start(settings: Settings) -> socket.socket:
            door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            server = BoundedServer(ServerConfig(build_small_app(settings), settings))
            thread = Thread(target=asyncio.run, args=(server.serve(sockets=[door]),))
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(setattr, server, "should_exit", True)
            return stack.enter_context(socket.create_connection(door.getsockname(), timeout=20))

        yield start


@pytest.fixture
def door() -> Iterator[socket.socket]:
    """A listening socket, whose address is known before a server has it."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        yield door


@pytest.fixture
def serve(
    door: socket.socket, make_dispatcher: Callable[[Settings], Dispatcher]
) -> Iterator[Callable[[Settings], None]]:
    """Serve the real application, with the engine that draws images from seeds, on the door."""
    with contextlib.ExitStack() as stack:

        def start(settings: Settings) -> None:
            server = BoundedServer(ServerConfig(create_app(settings, make_dispatcher(settings)), settings))
            thread = Thread(target=asyncio.run, args=(server.serve(sockets=[door]),))
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(setattr, server, "should_exit", True)

        yield start
