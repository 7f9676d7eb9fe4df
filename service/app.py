"""The web application around a worker."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from service.api import routes_images, routes_jobs, routes_meshes, routes_models, routes_operations
from service.api.errors import add_error_handlers
from service.api.middleware import BodyLimit, RequestId
from service.jobs.memory import MemoryStore
from service.jobs.results import MemoryResults
from service.metrics import Metrics
from service.settings import Settings
from service.worker import Worker, WorkerLimits

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine


def build_worker(
    settings: Settings, load_engine: Callable[[], "Engine"], *, clock: Callable[[], float] = time.time
) -> Worker:
    """A worker with a store in memory. `load_engine` is called in the worker's thread, when it is started."""
    results = MemoryResults(ttl_s=settings.result_ttl_s, max_bytes=settings.max_result_bytes, clock=clock)
    store = MemoryStore(results, job_ttl_s=settings.job_ttl_s, clock=clock)
    limits = WorkerLimits(
        max_batch_size=settings.max_batch_size, max_running=settings.max_running, grace_s=settings.grace_s
    )
    return Worker(load_engine, store, Metrics(), limits, clock=clock)


def create_app(settings: Settings, worker: Worker) -> FastAPI:
    """The application. Whoever calls starts the worker; the application stops it when it ends."""
    # One at a time, which bounds the memory that decoded pictures take.
    picture_checks = ThreadPoolExecutor(1, thread_name_prefix="pictures")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        picture_checks.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(worker.stop)

    # FastAPI's own documentation page loads its scripts from a CDN; this one brings them along.
    app = FastAPIOffline(
        title="Elastic DiT Serve",
        description="Pictures from texts and meshes from pictures, by diffusion transformers that spend compute where "
        "it is needed.",
        version="0.1.0",
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.worker = worker
    app.state.settings = settings
    app.state.picture_checks = picture_checks
    limits = {"/v1/meshes": settings.max_mesh_body_bytes}
    app.add_middleware(BodyLimit, max_body_bytes=settings.max_body_bytes, of_paths=limits)
    app.add_middleware(RequestId)
    add_error_handlers(app)
    for routes in (routes_images, routes_meshes, routes_jobs, routes_models, routes_operations):
        app.include_router(routes.router)
    _document_own_errors_only(app)
    return app


def _document_own_errors_only(app: FastAPI) -> None:
    """Take FastAPI's validation error, which is never answered here, out of the OpenAPI document."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                if "HTTPValidationError" in str(operation["responses"].get("422")):
                    del operation["responses"]["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # the way that FastAPI documents
