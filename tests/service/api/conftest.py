"""A small application behind the real entrance, so that its doors are tested without what is behind them."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
from fastapi import Body, FastAPI, Request
from starlette.responses import HTMLResponse

from service.api.auth import require
from service.api.entrance import Entrance
from service.api.errors import add_error_handlers
from service.keys import Scope
from service.settings import Settings


@pytest.fixture
def rejections() -> list[str]:
    """The codes of what small applications refused before it reached a route."""
    return []


@pytest.fixture
def build_small_app(rejections: list[str]) -> Callable[[Settings], FastAPI]:
    def build(settings: Settings) -> FastAPI:
        entrance = Entrance(settings)

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            yield
            await entrance.close()

        app = FastAPI(lifespan=lifespan, telemetry=entrance.telemetry, redirect_slashes=False)

        @app.post("/v1/images/generations", dependencies=[require(Scope.GENERATE)])
        async def create_image(request: Request, body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
            request.state.job_id = "job_1"
            if body["prompt"] == "break":
                raise RuntimeError("a bug")
            return {"created": 1, "data": [{"b64_json": "AA=="}]}

        @app.get("/v1/jobs/{job_id}", dependencies=[require(Scope.GENERATE)])
        async def show_job(job_id: str, request: Request) -> dict[str, Any]:
            return {"id": job_id, "key": request.state.key and request.state.key.id}

        @app.get("/metrics", dependencies=[require(Scope.METRICS)])
        async def show_metrics() -> str:
            return ""

        @app.get("/healthz")
        async def check_health() -> str:
            return "ok"

        @app.get("/page")
        async def show_page() -> HTMLResponse:
            return HTMLResponse("<p>page</p>", headers={"Referrer-Policy": "origin"})

        entrance.add_to(app, rejections.append)
        add_error_handlers(app)
        return app

    return build
