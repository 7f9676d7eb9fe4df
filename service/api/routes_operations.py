"""For operators: liveness, readiness and metrics."""

from collections.abc import Mapping
from contextlib import suppress

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from service.api.access import Access
from service.api.dependencies import DispatcherOfApp, SettingsOfApp
from service.api.errors import error_responses
from service.api.responses import HealthBody, ReadyBody, ReadyModel
from service.errors import Draining, StoreUnavailable
from service.keys import Scope
from service.running.dispatcher import Dispatcher

# Metrics need a key. The probes are open: a load balancer has no key.
router = APIRouter(tags=["operations"])


@router.get("/healthz", summary="Whether the process is alive")
async def check_health() -> HealthBody:
    return HealthBody(status="ok")


@router.get(
    "/readyz",
    summary="Whether a worker serves some model, jobs and results can be stored and requests are accepted",
    response_model=ReadyBody,
    response_model_exclude_unset=True,
    responses={503: {"model": ReadyBody, "description": "Not ready, with the reason."}},
)
async def check_readiness(dispatcher: DispatcherOfApp) -> ReadyBody | JSONResponse:
    models: dict[str, ReadyModel] = {}
    try:
        dispatcher.check_accepting()
        await dispatcher.store.check()
        models = await _served_models(dispatcher)
        if dispatcher.has_worker and not dispatcher.worker.is_alive:
            return _unavailable("no model is loaded", models)
        if not any(model.workers for model in models.values()):
            return _unavailable("no worker serves any model", models)
    except (Draining, StoreUnavailable) as error:
        return _unavailable(str(error), models)
    return ReadyBody(status="ready", models=models)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **error_responses(401, 403)},
    dependencies=[Depends(Access(Scope.METRICS))],
)
async def show_metrics(dispatcher: DispatcherOfApp, settings: SettingsOfApp) -> Response:
    with suppress(StoreUnavailable):  # the store counts its own errors; the gauges keep their values
        load, target_s = await dispatcher.store.load(), settings.target_backlog_s
        dispatcher.metrics.observe_queue(load, dispatcher.fleet.workers, target_backlog_s=target_s)
    return Response(dispatcher.metrics.exposition(dispatcher.num_running()), media_type=CONTENT_TYPE_LATEST)


async def _served_models(dispatcher: Dispatcher) -> dict[str, ReadyModel]:
    """The models that workers serve, and those that clients or queued jobs ask for in vain."""
    fleet, load = dispatcher.fleet, await dispatcher.store.load()
    waiting = [model for model, of_model in load.models.items() if of_model.num_queued]
    return {
        model: ReadyModel(workers=fleet.num_workers(model), queued=load.of(model).num_queued)
        for model in dict.fromkeys([*fleet.cards, *fleet.absent, *waiting])
    }


def _unavailable(reason: str, models: Mapping[str, ReadyModel]) -> JSONResponse:
    return JSONResponse(
        ReadyBody(status="unavailable", reason=reason, models=dict(models)).model_dump(exclude_defaults=True), 503
    )
