"""The web application around a dispatcher and its worker."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from service.api import routes_images, routes_jobs, routes_meshes, routes_models, routes_operations
from service.api.errors import add_error_handlers
from service.api.middlewares import Middlewares
from service.api.routes_playground import add_playground
from service.jobs.job import Job
from service.jobs.memory import MemoryStore
from service.jobs.redis import RedisStore, connect
from service.jobs.results import MemoryResults, RedisResults, Results, VolumeResults
from service.jobs.store import JobStore
from service.metrics import Metrics
from service.running.dispatcher import Dispatcher, Timing
from service.running.worker import Worker, WorkerLimits
from service.settings import Settings
from service.webhooks import Webhooks

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine


def build_dispatcher(
    settings: Settings, load_engine: Callable[[], "Engine"], *, clock: Callable[[], float] = time.time
) -> Dispatcher:
    """A worker with its store. `load_engine` is called in the worker's thread, when that is started."""
    metrics = Metrics()
    limits = WorkerLimits(max_batch_size=settings.max_batch_size, max_running=settings.max_running)
    return Dispatcher(
        _store(settings, metrics, clock),
        Worker(load_engine, metrics, limits, clock=clock),
        metrics,
        Timing(lease_s=settings.lease_s, grace_s=settings.grace_s),
        clock=clock,
        tell_webhook=_webhooks(settings, clock),
    )


def _webhooks(settings: Settings, clock: Callable[[], float]) -> Callable[[Job], Awaitable[bool]] | None:
    if settings.webhook_secret is None:
        return None
    base = (settings.public_url or "").rstrip("/")
    return Webhooks(settings.webhook_secret.get_secret_value(), base, clock=clock).deliver


def _store(settings: Settings, metrics: Metrics, clock: Callable[[], float]) -> JobStore:
    redis = connect(settings.redis_url) if settings.redis_url else None
    ttl_s, max_bytes = settings.result_ttl_s, settings.max_result_bytes
    results: Results
    if settings.results_url is not None:
        results = VolumeResults(settings.results_url, ttl_s=ttl_s, max_bytes=max_bytes, clock=clock)
    elif redis is not None:
        results = RedisResults(redis, ttl_s=ttl_s, max_bytes=max_bytes)
    else:
        results = MemoryResults(ttl_s=ttl_s, max_bytes=max_bytes, clock=clock)
    leases: dict[str, Any] = {
        "job_ttl_s": settings.job_ttl_s,
        "events_ttl_s": ttl_s,
        "lease_s": settings.lease_s,
        "max_attempts": settings.max_attempts,
        "clock": clock,
    }
    if redis is None:
        return MemoryStore(results, **leases)
    return RedisStore(redis, results, on_error=metrics.observe_store_error, **leases)


def create_app(settings: Settings, dispatcher: Dispatcher) -> FastAPI:
    """The application. Whoever calls has started the dispatcher's worker; the application stops it when it ends."""
    app = _bare_app(settings, dispatcher)
    for routes in (routes_images, routes_meshes, routes_jobs, routes_models, routes_operations):
        app.include_router(routes.router)
    add_playground(app)
    return app


def create_worker_app(settings: Settings, dispatcher: Dispatcher) -> FastAPI:
    """What a bare worker answers: whether it lives, whether it is ready, and its metrics."""
    app = _bare_app(settings, dispatcher)
    app.include_router(routes_operations.router)
    return app


def _bare_app(settings: Settings, dispatcher: Dispatcher) -> FastAPI:
    # One at a time, which bounds the memory that decoded pictures take.
    picture_checks = ThreadPoolExecutor(1, thread_name_prefix="pictures")
    middlewares = Middlewares(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with dispatcher.running():
            yield
        picture_checks.shutdown(wait=False, cancel_futures=True)
        await middlewares.close()

    # FastAPI's own documentation page loads its scripts from a CDN; this one brings them along.
    app = FastAPIOffline(
        title="Elastic DiT Serve",
        description="Pictures from texts and meshes from pictures, by diffusion transformers that spend compute where "
        "it is needed.",
        version=version("elastic-dit-serve"),
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry=middlewares.telemetry,
    )
    app.state.dispatcher = dispatcher
    app.state.settings = settings
    app.state.picture_checks = picture_checks
    middlewares.add_to(app, count_rejection=lambda code: dispatcher.metrics.observe_rejection("", code))
    add_error_handlers(app)
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
