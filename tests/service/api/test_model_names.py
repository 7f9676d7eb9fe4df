import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.card import ImageCard, MeshCard, ModelCard
from models.errors import InvalidRequest, UnknownModel
from service.api.model_names import card_of
from service.errors import ModelUnavailable
from service.jobs.memory import MemoryStore
from service.jobs.results import MemoryResults
from service.running.fleet import Fleet
from service.scheduling.fleet import WorkerRecord, WorkerState
from service.settings import Settings

LEASES: dict[str, Any] = {
    "job_ttl_s": 60.0,
    "events_ttl_s": 60.0,
    "lease_s": 15.0,
    "max_attempts": 2,
    "clock": time.time,
}
ALIASES = {"gpt-image-1": "guided", "gpt-image-*": "drawn", "dall-e-?": "guided", "mesh*": "ball", "dr*": "guided"}


def fleet_of(*cards: ModelCard, models: tuple[str, ...] = ()) -> Fleet:
    """That of a process whose worker has these models, in a fleet which should have `models` besides."""
    own = WorkerRecord("own", "1", "cpu", WorkerState.IDLE, {card.id: card for card in cards})
    store = MemoryStore(MemoryResults(ttl_s=1.0, max_bytes=1, clock=time.time), **LEASES)
    return Fleet(store, lambda: own, models)


@pytest.fixture
def loaded(drawn_card: ImageCard, guided_card: ImageCard, mesh_card: MeshCard) -> Fleet:
    return fleet_of(drawn_card, guided_card, mesh_card)


@pytest.mark.parametrize("name", [None, ""])
def test_model_without_a_name_is_the_first_of_its_kind(name: str | None, loaded: Fleet) -> None:
    assert card_of(name, loaded, ImageCard, {}).id == "drawn"
    assert card_of(name, loaded, MeshCard, {}).id == "ball"
    with pytest.raises(UnknownModel, match="no mesh model is loaded"):
        card_of(name, fleet_of(loaded.card("drawn")), MeshCard, {})


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gpt-image-1", "guided"),  # the first pattern that fits
        ("gpt-image-2.5-flare", "drawn"),
        ("dall-e-3", "guided"),
        ("drawn", "drawn"),  # a loaded model comes before patterns
        ("drafted", "guided"),
    ],
)
def test_other_names_stand_for_models(name: str, model: str, loaded: Fleet) -> None:
    assert card_of(name, loaded, ImageCard, ALIASES).id == model


def test_mesh_model_has_other_names_too(loaded: Fleet) -> None:
    assert card_of("meshes", loaded, MeshCard, ALIASES).id == "ball"
    with pytest.raises(InvalidRequest, match="'meshes', which stands for ball, makes no image, but a mesh; try drawn"):
        card_of("meshes", loaded, ImageCard, ALIASES)


def test_model_of_another_kind_and_unknown_models_are_refused(loaded: Fleet) -> None:
    with pytest.raises(InvalidRequest, match="'ball' makes no image, but a mesh; try drawn, guided"):
        card_of("ball", loaded, ImageCard, {})
    for name in ("x", "GPT-image-1", "dall-e-33"):
        with pytest.raises(UnknownModel, match=f"'{name}'; loaded: drawn, guided, ball; the setting model_aliases"):
            card_of(name, loaded, ImageCard, ALIASES)


def test_model_that_no_worker_holds_is_unavailable_under_all_its_names(drawn_card: ImageCard) -> None:
    fleet = fleet_of(drawn_card, models=("guided", "drawn"))
    for name in ("guided", "gpt-image-1"):
        with pytest.raises(ModelUnavailable, match="no worker holds the model 'guided'"):
            card_of(name, fleet, ImageCard, ALIASES)
    assert card_of(None, fleet, ImageCard, {}).id == "drawn"  # the first that is there
    with pytest.raises(
        ModelUnavailable, match="no worker holds any mesh model now: models without a worker are guided"
    ):
        card_of(None, fleet, MeshCard, {})
    with pytest.raises(ModelUnavailable, match="no worker holds any image model now: there is no worker"):
        card_of(None, fleet_of(), ImageCard, {})
    with pytest.raises(UnknownModel):
        card_of("x", fleet, ImageCard, ALIASES)
    with pytest.raises(ModelUnavailable, match="no worker holds 'x', or any other model") as unavailable:
        card_of("x", fleet_of(), ImageCard, {})
    assert unavailable.value.model == ""  # else clients could make labels of metrics


def test_server_with_aliases_answers_the_models_own_id(start_client: Callable[..., TestClient]) -> None:
    client = start_client(Settings.model_validate({"models": "drawn", "model_aliases": "dall-e-*=drawn"}))
    answer = client.post("/v1/images/generations", json={"prompt": "a", "model": "dall-e-3"})
    assert answer.json()["model"] == "drawn"
    assert client.get("/v1/models/dall-e-3").json() == client.get("/v1/models/drawn").json()
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["drawn", "guided", "ball"]
    assert client.post("/v1/images/generations", json={"prompt": "a", "model": "gpt-image-1"}).status_code == 404
