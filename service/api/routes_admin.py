"""For operators: the models of this server's own worker."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from service.api.access import Access
from service.api.errors import error_responses
from service.api.responses import AdminModelBody, AdminModelList
from service.keys import Scope
from service.running.model_changes import ModelChanges, ModelStatus

router = APIRouter(
    prefix="/admin/models",
    tags=["admin"],
    dependencies=[Depends(Access(Scope.ADMIN))],
    responses=error_responses(401, 403),
)


def _model_changes(request: Request) -> ModelChanges:
    model_changes: ModelChanges = request.app.state.model_changes
    return model_changes


ModelChangesOfApp = Annotated[ModelChanges, Depends(_model_changes)]


@router.get("", summary="The models that this worker has loaded or could load")
async def list_loadable_models(model_changes: ModelChangesOfApp) -> AdminModelList:
    statuses = await model_changes.statuses()
    return AdminModelList(
        object="list",
        data=[AdminModelBody(id=model, object="model", status=status) for model, status in statuses.items()],
    )


@router.post("/{model_id}/load", summary="Load a model", responses=error_responses(404, 422, 503))
async def load_model(model_id: str, model_changes: ModelChangesOfApp) -> AdminModelBody:
    """The call returns when this worker takes jobs of the model, which may take minutes. Other jobs go on meanwhile,
    and pause for seconds while the new model is measured."""
    await model_changes.load(model_id)
    return AdminModelBody(id=model_id, object="model", status=ModelStatus.LOADED)


@router.post("/{model_id}/unload", summary="Unload a model", responses=error_responses(404, 503))
async def unload_model(model_id: str, model_changes: ModelChangesOfApp) -> AdminModelBody:
    """The worker takes no more jobs of the model. The call returns when the model's running jobs have ended and its
    memory is free. Jobs that wait for the model stay in the queue."""
    await model_changes.unload(model_id)
    return AdminModelBody(id=model_id, object="model", status=ModelStatus.AVAILABLE)
