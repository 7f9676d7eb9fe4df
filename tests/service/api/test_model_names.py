from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from models.card import ImageCard, MeshCard, ModelCard
from models.errors import InvalidRequest, UnknownModel
from service.api.model_names import card_of
from service.settings import Settings

ALIASES = {"gpt-image-1": "guided", "gpt-image-*": "drawn", "dall-e-?": "guided", "mesh*": "ball", "dr*": "guided"}


@pytest.fixture
def loaded(drawn_card: ImageCard, guided_card: ImageCard, mesh_card: MeshCard) -> dict[str, ModelCard]:
    return {card.id: card for card in (drawn_card, guided_card, mesh_card)}


@pytest.mark.parametrize("name", [None, ""])
def test_model_without_a_name_is_the_first_of_its_kind(name: str | None, loaded: dict[str, ModelCard]) -> None:
    assert card_of(name, loaded, ImageCard, {}).id == "drawn"
    assert card_of(name, loaded, MeshCard, {}).id == "ball"
    with pytest.raises(UnknownModel, match="no mesh model is loaded"):
        card_of(name, {"drawn": loaded["drawn"]}, MeshCard, {})


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
def test_other_names_stand_for_models(name: str, model: str, loaded: dict[str, ModelCard]) -> None:
    assert card_of(name, loaded, ImageCard, ALIASES).id == model


def test_mesh_model_has_other_names_too(loaded: dict[str, ModelCard]) -> None:
    assert card_of("meshes", loaded, MeshCard, ALIASES).id == "ball"
    with pytest.raises(InvalidRequest, match="'meshes', which stands for ball, makes no image, but a mesh; try drawn"):
        card_of("meshes", loaded, ImageCard, ALIASES)


def test_model_of_another_kind_and_unknown_models_are_refused(loaded: dict[str, ModelCard]) -> None:
    with pytest.raises(InvalidRequest, match="'ball' makes no image, but a mesh; try drawn, guided"):
        card_of("ball", loaded, ImageCard, {})
    for name in ("x", "GPT-image-1", "dall-e-33"):
        with pytest.raises(UnknownModel, match=f"'{name}'; loaded: drawn, guided, ball; the setting model_aliases"):
            card_of(name, loaded, ImageCard, ALIASES)


def test_server_with_aliases_answers_the_models_own_id(start_client: Callable[..., TestClient]) -> None:
    client = start_client(Settings.model_validate({"models": "drawn", "model_aliases": "dall-e-*=drawn"}))
    answer = client.post("/v1/images/generations", json={"prompt": "a", "model": "dall-e-3"})
    assert answer.json()["model"] == "drawn"
    assert client.get("/v1/models/dall-e-3").json() == client.get("/v1/models/drawn").json()
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["drawn", "guided", "ball"]
    assert client.post("/v1/images/generations", json={"prompt": "a", "model": "gpt-image-1"}).status_code == 404
