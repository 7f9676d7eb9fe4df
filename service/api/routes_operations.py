"""For operators: liveness, readiness and metrics."""

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from service.api.access import Access
from service.api.dependencies import DispatcherOfApp
from service.api.errors import error_responses
from service.api.responses import HealthBody, ReadyBody
from service.errors import Draining, StoreUnavailable
from service.keys import Scope

# Metrics need a key. The probes are open: a load balancer has no key.
router = APIRouter(tags=["operations"])


@router.get("/healthz", summary="Whether the process is alive")
async def check_health() -> HealthBody:
    return HealthBody(status="ok")


@router.get(
    "/readyz",
    summary="Whether the models are loaded, jobs and results can be stored and requests are accepted",
    response_model=ReadyBody,
    response_model_exclude_unset=True,
    responses={503: {"model": ReadyBody, "description": "Not ready, with the reason."}},
)
async def check_readiness(dispatcher: DispatcherOfApp) -> ReadyBody | JSONResponse:
    try:
        dispatcher.check_accepting()
        if not dispatcher.worker.is_alive:
            return _unavailable("no model is loaded")
        await dispatcher.store.check()
    except (Draining, StoreUnavailable) as error:
        return _unavailable(str(error))
    return ReadyBody(status="ready")


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **error_responses(401, 403)},
    dependencies=[Depends(Access(Scope.METRICS))],
)
async def show_metrics(dispatcher: DispatcherOfApp) -> Response:
    try:
        load = await dispatcher.store.load()
        waiting = {model: of_model.num_queued for model, of_model in load.models.items()}
    except StoreUnavailable:  # the store counts its own errors
        waiting = None
    page = dispatcher.metrics.exposition(dispatcher.cards, dispatcher.num_running(), waiting)
    return Response(page, media_type=CONTENT_TYPE_LATEST)


def _unavailable(reason: str) -> JSONResponse:
    return JSONResponse(ReadyBody(status="unavailable", reason=reason).model_dump(), 503)
