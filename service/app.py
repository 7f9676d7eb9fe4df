"""Builds the web application, and the dispatcher with its store and its worker."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts
from fastapi_offline import FastAPIOffline
from redis.asyncio import Redis

from service.api import (
    routes_admin,
    routes_edits,
    routes_images,
    routes_jobs,
    routes_meshes,
    routes_models,
    routes_operations,
)
from service.api.errors import add_error_handlers
from service.api.image_checks import ImageChecks
from service.api.job_views import job_body
from service.api.links import Links, link_signer
from service.api.middlewares import Middlewares
from service.api.routes_playground import add_playground
from service.errors import BadConfiguration
from service.jobs.job import JobSnapshot
from service.jobs.memory import MemoryStore
from service.jobs.redis import RedisStore
from service.jobs.redis_operations import connect
from service.jobs.results import MemoryResults, RedisResults, Results, VolumeResults
from service.jobs.shared_clock import SharedClock
from service.jobs.store import EVENTS_TTL_S, JobStore
from service.metrics import Metrics
from service.running.dispatcher import Dispatcher, Timing
from service.running.inbox import Inbox
from service.running.model_changes import ModelChanges
from service.settings import Settings
from service.webhooks import Webhooks

if TYPE_CHECKING:  # models.engine imports torch, which the API side never loads
    from models.engine import Engine
    from service.running.worker import Worker


def build_dispatcher(
    settings: Settings, load_engine: Callable[[], "Engine"] | None = None, *, clock: Callable[[], float] = time.time
) -> Dispatcher:
    """A dispatcher with its store and its worker, which calls `load_engine` in its own thread when it starts.

    Without `load_engine` there is no worker, and nothing that computes is imported.
    """
    metrics, inbox = Metrics(), Inbox()
    store = build_store(settings, metrics, clock)
    return Dispatcher(
        store,
        _worker(settings, load_engine, metrics, inbox, store.clock) if load_engine else None,
        inbox,
        metrics,
        Timing(lease_s=settings.lease_s, grace_s=settings.grace_s),
        clock=store.clock,
        models=() if load_engine else settings.wanted_models,
        deliver_webhook=_webhooks(settings, clock, store.clock),
    )


def _worker(
    settings: Settings,
    load_engine: Callable[[], "Engine"],
    metrics: Metrics,
    inbox: Inbox,
    clock: Callable[[], float],
) -> "Worker":
    from service.running.room import WorkerLimits
    from service.running.worker import Worker

    limits = WorkerLimits(settings.max_batch_size, settings.max_running, settings.max_decode_bytes)
    return Worker(
        load_engine,
        metrics,
        limits,
        device=settings.device,
        version=version("elastic-dit-serve"),
        report=inbox.report,
        on_room=inbox.wake,
        clock=clock,
    )


def _webhooks(
    settings: Settings, clock: Callable[[], float], store_clock: Callable[[], float]
) -> Callable[[JobSnapshot], Awaitable[bool]] | None:
    if settings.webhook_secret is None:
        return None
    links = Links(settings.public_url or "", link_signer(settings, store_clock))

    def describe(snapshot: JobSnapshot) -> dict[str, Any]:
        return job_body(snapshot, links).model_dump(mode="json", exclude_unset=True)

    return Webhooks(settings.webhook_secret.get_secret_value(), describe, clock=clock).deliver


def build_store(settings: Settings, metrics: Metrics, local_clock: Callable[[], float] = time.time) -> JobStore:
    """The job store of these settings. `metrics` counts its errors."""
    redis = _redis(settings.redis_url) if settings.redis_url is not None else None
    clock = local_clock if redis is None else SharedClock(local_clock)
    limits: dict[str, Any] = {"ttl_s": settings.result_ttl_s, "max_bytes": settings.max_result_bytes}
    results: Results
    if settings.results_url is not None:
        try:
            results = VolumeResults(settings.results_url, **limits, on_error=metrics.observe_store_error, clock=clock)
        except (ValueError, ImportError) as error:  # an unknown scheme, or a package that it needs
            raise BadConfiguration(f"results_url: {error}") from error
    elif redis is not None:
        results = RedisResults(redis, **limits, on_error=metrics.observe_store_error)
    else:
        results = MemoryResults(**limits, clock=clock)
    leases: dict[str, Any] = {
        "job_ttl_s": settings.job_ttl_s,
        "events_ttl_s": min(settings.result_ttl_s, EVENTS_TTL_S),
        "lease_s": settings.lease_s,
        "max_attempts": settings.max_attempts,
        "clock": clock,
    }
    if redis is None:
        return MemoryStore(results, **leases)
    return RedisStore(redis, results, on_error=metrics.observe_store_error, **leases)


def _redis(url: str) -> Redis:
    """A client of the Redis at `url`. Raises BadConfiguration if that is not the URL of a Redis."""
    try:
        redis = connect(url)
        # Checks the options, and does not connect. redis-py leaves it without types.
        redis.connection_pool.make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError) as error:
        raise BadConfiguration(f"redis_url: {error}; write one such as redis://localhost:6379/0") from error
    return redis


def create_app(settings: Settings, dispatcher: Dispatcher, model_changes: ModelChanges | None = None) -> FastAPI:
    """The application. The caller has started the dispatcher's worker, if any; the application stops it at its end.

    With `model_changes` operators may load and unload the worker's models.
    """
    app = _bare_app(settings, dispatcher, model_changes)
    for routes in (routes_images, routes_edits, routes_meshes, routes_jobs, routes_models, routes_operations):
        app.include_router(routes.router)
    add_playground(app)
    _check_prefix(app, settings.path_prefix)
    return app


def _check_prefix(app: FastAPI, prefix: str) -> None:
    """Raise BadConfiguration if paths below `prefix` are paths of the API too: nobody could tell which is meant."""
    for context in iter_route_contexts(app.routes if prefix else ()):
        path = getattr(context.original_route, "path", "")
        if f"{path}/".startswith(f"{prefix}/"):
            raise BadConfiguration(f"public_url ends in {prefix}, where the API has {path}; leave it out of the URL")


def create_worker_app(settings: Settings, dispatcher: Dispatcher, model_changes: ModelChanges | None = None) -> FastAPI:
    """The application of a bare worker: liveness, readiness and metrics, and with `model_changes` its models."""
    app = _bare_app(settings, dispatcher, model_changes)
    app.include_router(routes_operations.router)
    return app


def _bare_app(settings: Settings, dispatcher: Dispatcher, model_changes: ModelChanges | None) -> FastAPI:
    image_checks = ImageChecks(settings.max_image_pixels)
    middlewares = Middlewares(settings, dispatcher.store.clock)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with dispatcher.running():
            yield
        image_checks.close()
        await middlewares.close()

    # FastAPI's own documentation page loads its scripts from a CDN; fastapi-offline serves them itself.
    app = FastAPIOffline(
        title="Elastic DiT Serve",
        description="Generates images, edits them and makes meshes from them with diffusion transformers that spend "
        "compute where it is needed. `HEAD` is answered wherever `GET` is. A slash at the end of a path means nothing.",
        version=version("elastic-dit-serve"),
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        telemetry=middlewares.telemetry,
    )
    app.state.dispatcher = dispatcher
    app.state.settings = settings
    app.state.image_checks = image_checks
    app.state.api_keys = middlewares.keys
    app.state.link_signer = middlewares.link_signer
    if model_changes is not None:
        app.state.model_changes = model_changes
        app.include_router(routes_admin.router)
    middlewares.add_to(app, count_rejection=lambda code: dispatcher.metrics.observe_rejection("", code))
    add_error_handlers(app)
    _document_own_errors_only(app)
    return app


def _document_own_errors_only(app: FastAPI) -> None:
    """Remove FastAPI's validation error from the OpenAPI document: this server never answers with it."""
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

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI documents it
