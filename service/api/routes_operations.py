"""For operators: is it alive, is it ready, what does it count."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST

from service.api.dependencies import WorkerOfApp
from service.api.responses import HealthBody, ReadyBody
from service.errors import Draining

router = APIRouter(tags=["operations"])


@router.get("/", include_in_schema=False)
async def show_docs() -> RedirectResponse:
    return RedirectResponse("/docs")


@router.get("/healthz", summary="Whether the process is alive")
async def check_health() -> HealthBody:
    return HealthBody(status="ok")


@router.get(
    "/readyz",
    summary="Whether the models are loaded and requests accepted",
    response_model=ReadyBody,
    response_model_exclude_unset=True,
    responses={503: {"model": ReadyBody, "description": "Not ready, with the reason."}},
)
async def check_readiness(worker: WorkerOfApp) -> ReadyBody | JSONResponse:
    try:
        worker.check_accepting()
    except Draining as error:
        return _unavailable(str(error))
    if not worker.is_alive:
        return _unavailable("no model is loaded")
    return ReadyBody(status="ready")


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def show_metrics(worker: WorkerOfApp) -> Response:
    page = worker.metrics.exposition(list(worker.cards), worker.store.load())
    return Response(page, media_type=CONTENT_TYPE_LATEST)


def _unavailable(reason: str) -> JSONResponse:
    return JSONResponse(ReadyBody(status="unavailable", reason=reason).model_dump(), 503)
