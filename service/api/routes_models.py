"""The loaded models, their limits and their calibration curves."""

from fastapi import APIRouter, Depends

from service.api.access import Access
from service.api.dependencies import DispatcherOfApp, SettingsOfApp
from service.api.errors import error_responses
from service.api.model_names import named_card
from service.api.responses import ModelBody, ModelList
from service.api.views import model_body
from service.keys import Scope

router = APIRouter(
    prefix="/v1/models",
    tags=["models"],
    dependencies=[Depends(Access(Scope.GENERATE))],
    responses=error_responses(401, 403),
)


@router.get("", summary="List the models, with their calibration curves", response_model_exclude_unset=True)
async def list_models(dispatcher: DispatcherOfApp, settings: SettingsOfApp) -> ModelList:
    budget = settings.default_budget.to_budget()
    return ModelList(object="list", data=[model_body(card, budget) for card in dispatcher.cards.values()])


# No id has a slash, but the path converter lets us answer such an id with our own error.
@router.get(
    "/{model_id:path}",
    summary="One model, by its id or a name that stands for it",
    response_model_exclude_unset=True,
    responses=error_responses(404, 503),
)
async def show_model(model_id: str, dispatcher: DispatcherOfApp, settings: SettingsOfApp) -> ModelBody:
    card = named_card(model_id, dispatcher.fleet, settings.model_aliases)
    return model_body(card, settings.default_budget.to_budget())
