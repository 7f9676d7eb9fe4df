"""Loading and unloading models of a running server, with the drawn engine."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from models.card import ImageCard
from models.errors import DeviceLost, WeightsError
from service.app import create_app
from service.keys import Scope, new_key
from service.running.dispatcher import Dispatcher
from service.running.model_changes import ModelChanges
from service.settings import Settings
from tests.fixtures.waiting import wait_until

PROMPT = {"prompt": "a red circle", "model": "drawn"}
ASYNC = {"Prefer": "respond-async"}
KEYS = {scope: new_key(scope, [scope]) for scope in (Scope.GENERATE, Scope.ADMIN)}


class Shelf:
    """The models that can be loaded. `threads` has the names of those that read weights and that add models."""

    def __init__(self, *cards: ImageCard) -> None:
        self._cards = {card.id: card for card in cards}
        self.threads: list[str] = []
        self.error: Exception | None = None

    def find(self) -> dict[str, Path]:
        return {model: Path("models") / model for model in self._cards}

    def load(self, directory: Path) -> Callable[[Any], None]:
        self.threads.append(threading.current_thread().name)

        def add(engine: Any) -> None:
            self.threads.append(threading.current_thread().name)
            if self.error is not None:
                raise self.error
            engine.add(self._cards[directory.name])

        return add


@pytest.fixture
def shelf(drawn_card: ImageCard, guided_card: ImageCard) -> Shelf:
    return Shelf(drawn_card, guided_card)


@pytest.fixture
def admin(
    make_dispatcher: Callable[[Settings], Dispatcher], shelf: Shelf, engine: Any
) -> Iterator[Callable[..., TestClient]]:
    clients: list[TestClient] = []

    def start(**settings: Any) -> TestClient:
        dispatcher = make_dispatcher(Settings(grace_s=20, **settings))
        app = create_app(
            dispatcher=dispatcher, settings=Settings(grace_s=20, **settings), model_changes=changes(dispatcher)
        )
        clients.append(TestClient(app, raise_server_exceptions=False).__enter__())
        return clients[-1]

    def changes(dispatcher: Dispatcher) -> ModelChanges:
        return ModelChanges(dispatcher, shelf.find, shelf.load)

    engine.cards = {model: card for model, card in engine.cards.items() if model != "guided"}
    yield start
    engine.gate.set()
    for client in clients:
        client.__exit__(None, None, None)


def statuses(client: TestClient) -> dict[str, str]:
    return {model["id"]: model["status"] for model in client.get("/admin/models").json()["data"]}


def test_loaded_model_is_served_at_once(admin: Callable[..., TestClient], shelf: Shelf) -> None:
    client = admin()
    assert client.post("/v1/images", json={**PROMPT, "model": "guided"}).status_code == 404
    assert statuses(client) == {"drawn": "loaded", "guided": "available", "ball": "loaded"}
    for _ in range(2):
        answer = client.post("/admin/models/guided/load")
        assert (answer.status_code, answer.json()) == (200, {"id": "guided", "object": "model", "status": "loaded"})
    reading, adding = shelf.threads  # once
    assert (adding, reading != adding) == ("worker", True)
    assert statuses(client)["guided"] == "loaded"
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["drawn", "ball", "guided"]
    assert client.post("/v1/images", json={**PROMPT, "model": "guided"}).status_code == 200
    assert 'elastic_requests_total{model="guided",status="failed"} 0.0' in client.get("/metrics").text


def test_unloading_lets_running_jobs_end_and_leaves_queued_ones(admin: Callable[..., TestClient], engine: Any) -> None:
    client = admin(max_running=1, max_backlog_s=1000.0)
    engine.gate.clear()
    running, queued = (client.post("/v1/images", json=PROMPT, headers=ASYNC).json()["id"] for _ in range(2))
    wait_until(lambda: client.get(f"/v1/jobs/{running}").json()["status"] == "running")
    with ThreadPoolExecutor(1) as thread:
        unloading = thread.submit(client.post, "/admin/models/drawn/unload")
        wait_until(lambda: statuses(client)["drawn"] == "unloading")
        refused = client.post("/v1/images", json=PROMPT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert client.get("/v1/models/drawn").status_code == 503
        assert "drawn" in engine.cards
        assert not unloading.done()
        engine.gate.set()
        assert unloading.result(60).json()["status"] == "available"
    assert [*engine.cards] == ["ball"]
    assert client.get(f"/v1/jobs/{running}").json()["status"] == "succeeded"
    assert client.get(f"/v1/jobs/{queued}").json()["status"] == "queued"
    ready = client.get("/readyz").json()
    assert (ready["status"], ready["models"]["drawn"]) == ("ready", {"workers": 0, "queued": 1})
    page = client.get("/metrics").text
    assert 'elastic_requests_rejected_total{code="model_unavailable",model="drawn"} 1.0' in page
    assert client.post("/admin/models/drawn/load").status_code == 200
    wait_until(lambda: client.get(f"/v1/jobs/{queued}").json()["status"] == "succeeded")


def test_last_model_can_be_unloaded(admin: Callable[..., TestClient]) -> None:
    client = admin()
    for model in ("drawn", "ball"):
        assert client.post(f"/admin/models/{model}/unload").status_code == 200
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no worker serves any model")
    assert client.post("/v1/images", json={"prompt": "a"}).json()["error"]["code"] == "model_unavailable"
    assert client.post("/admin/models/drawn/load").status_code == 200
    assert client.post("/v1/images", json={"prompt": "a"}).status_code == 200


def test_models_that_are_not_there_are_named(admin: Callable[..., TestClient]) -> None:
    client = admin()
    answer = client.post("/admin/models/..%2Fsecret/load")
    assert answer.status_code == 404
    answer = client.post("/admin/models/none/load")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "no model 'none' to load; there are: drawn, guided" in answer.json()["error"]["message"]
    answer = client.post("/admin/models/guided/unload")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "'guided' is not loaded; loaded: drawn, ball" in answer.json()["error"]["message"]


def test_model_that_fails_to_load_changes_nothing(admin: Callable[..., TestClient], shelf: Shelf, engine: Any) -> None:
    client = admin()
    shelf.error = WeightsError("models/guided has no transformer")
    answer = client.post("/admin/models/guided/load")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "model_not_loadable")
    assert "model 'guided' can't be loaded: models/guided has no transformer" in answer.json()["error"]["message"]
    assert statuses(client)["guided"] == "available"
    assert client.post("/v1/images", json=PROMPT).status_code == 200


def test_worker_that_loses_its_device_answers_the_call(admin: Callable[..., TestClient], shelf: Shelf) -> None:
    client = admin()
    shelf.error = DeviceLost("the device is lost")
    assert client.post("/admin/models/guided/load").status_code == 422
    answer = client.post("/admin/models/drawn/unload")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")


def test_only_admins_may_change_models(admin: Callable[..., TestClient]) -> None:
    entries = [entry.model_dump(mode="json", exclude_none=True) for _, entry in KEYS.values()]
    client = admin(api_keys=json.dumps(entries))

    def status_for(scope: Scope | None) -> int:
        headers = {} if scope is None else {"Authorization": f"Bearer {KEYS[scope][0]}"}
        return client.post("/admin/models/guided/load", headers=headers).status_code

    assert [status_for(scope) for scope in (None, Scope.GENERATE, Scope.ADMIN)] == [401, 403, 200]
