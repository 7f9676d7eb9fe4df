"""Latency budgets, and quality that load may lower, over HTTP."""

import time
from collections.abc import Callable
from typing import Any, cast

import pytest
from fastapi.testclient import TestClient

from models.curve import Preset
from service.budget import BudgetBody
from service.settings import Settings

PROMPT: dict[str, Any] = {"prompt": "a red circle", "seed": 3}
ASYNC = {"Prefer": "respond-async"}


def made(client: TestClient, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/images", json={**PROMPT, **fields})
    assert response.status_code == 200, response.text
    receipt: dict[str, Any] = response.json()["receipt"]
    return receipt


# A dense step of this model is predicted to take 0.5 s; it takes milliseconds.
def test_roomy_deadline_gives_the_best_quality(client: TestClient) -> None:
    receipt = made(client, budget={"latency_ms": 60_000})
    assert (receipt["quality_applied"], receipt["deadline_met"], receipt["quality_requested"]) == (1.0, True, None)


def test_tight_deadline_begins_cheap_and_never_goes_below_the_floor(client: TestClient, engine: Any) -> None:
    moves = engine.moves
    made(client, budget={"latency_ms": 1100})
    assert moves[0].quality == 0.6
    moves.clear()
    made(client, budget={"latency_ms": 1500, "min_quality": 0.9})
    assert min(point.quality for point in moves) == 0.9
    # Steps turn out to be much faster than predicted, and so the rest is as good as it gets.
    assert moves[-1].quality == 1.0


def test_missed_deadline_is_reported(client: TestClient, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    step = engine.step

    def slow_step(states: Any) -> Any:
        time.sleep(0.3)
        return step(states)

    monkeypatch.setattr(engine, "step", slow_step)
    receipt = made(client, budget={"latency_ms": 1100})
    assert receipt["deadline_met"] is False
    assert 'elastic_deadline_total{model="drawn",outcome="missed"} 1.0' in client.get("/metrics").text


def test_unreachable_deadline_is_refused_with_the_prediction(client: TestClient) -> None:
    response = client.post("/v1/images", json={**PROMPT, "budget": {"latency_ms": 100}})
    assert response.status_code == 422
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("deadline_unreachable", "budget.latency_ms")
    assert "1078 ms" in error["message"]  # four steps of 0.5 s at 0.46, the answer, and a tenth in reserve


@pytest.mark.parametrize(
    ("budget", "before_ms"),
    [({"preset": "exact"}, 1000), ({"latency_ms": 60_000}, 3000)],  # two steps; and the 2 s of an urgent job
    ids=["others", "urgent"],
)
def test_deadline_counts_the_work_that_goes_before_it(
    budget: dict[str, object], before_ms: int, client: TestClient, engine: Any
) -> None:
    engine.gate.clear()
    for _ in range(3):
        client.post("/v1/images", json={**PROMPT, "budget": {"preset": "exact"}}, headers=ASYNC)
    client.post("/v1/images", json={**PROMPT, "budget": budget}, headers=ASYNC)
    response = client.post("/v1/images", json={**PROMPT, "budget": {"latency_ms": 2000}})
    engine.gate.set()
    assert response.json()["error"]["code"] == "deadline_unreachable"
    assert f" {before_ms} of them are the work of earlier requests" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("budget", "quality", "is_degraded"),
    [
        ({"preset": "exact"}, 1.0, False),
        ({"preset": "exact", "min_quality": 0.8}, 0.8, True),
        ({"quality": 0.9, "min_quality": 0.9}, 0.9, False),
        ({"compute_ratio": 0.8, "min_quality": 0.6}, 0.6, True),
    ],
)
def test_load_lowers_quality_only_where_and_as_far_as_the_client_allows(
    budget: dict[str, Any],
    quality: float,
    is_degraded: bool,
    engine: Any,
    start_client: Callable[..., TestClient],
) -> None:
    client = start_client(Settings(max_backlog_s=10))
    engine.gate.clear()
    for _ in range(4):  # 8 s of work
        client.post("/v1/images", json={**PROMPT, "budget": {"preset": "exact"}}, headers=ASYNC)
    job_id = client.post("/v1/images", json={**PROMPT, "budget": budget}, headers=ASYNC).json()["id"]
    engine.gate.set()
    client.get(f"/v1/jobs/{job_id}/events")
    receipt = client.get(f"/v1/jobs/{job_id}").json()["receipt"]
    assert (receipt["quality_applied"], receipt["degraded"]) == (quality, is_degraded)
    page = client.get("/metrics").text
    assert ('elastic_quality_degraded_total{model="drawn"} 1.0' in page) is is_degraded


@pytest.mark.parametrize(
    ("fields", "quality", "is_degraded"),
    [({}, 0.6, True), ({"quality": "auto"}, 0.6, True), ({"quality": "high"}, 0.97, False)],
)
def test_floor_of_the_default_budget_is_for_requests_that_name_none(
    fields: dict[str, Any], quality: float, is_degraded: bool, engine: Any, start_client: Callable[..., TestClient]
) -> None:
    """The word `high` means the default budget's preset here, but is the client's own wish."""
    budget = BudgetBody(preset=Preset.HIGH, min_quality=0.6)
    client = start_client(Settings(max_backlog_s=10, default_budget=budget))
    engine.gate.clear()
    for _ in range(4):  # 8 s of work
        client.post("/v1/images", json={**PROMPT, "budget": {"preset": "exact"}}, headers=ASYNC)
    job_id = client.post("/v1/images", json={**PROMPT, **fields}, headers=ASYNC).json()["id"]
    engine.gate.set()
    client.get(f"/v1/jobs/{job_id}/events")
    receipt = client.get(f"/v1/jobs/{job_id}").json()["receipt"]
    assert (receipt["quality_applied"], receipt["degraded"]) == (quality, is_degraded)


def test_deadline_leaves_the_time_that_answers_take_lately(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = cast(Any, client.app).state.dispatcher
    client.post("/v1/images", json=PROMPT, headers={"Idempotency-Key": "a"})
    took_s = dispatcher.delivery_s
    assert 0 < took_s < 5
    time.sleep(0.2)
    client.post("/v1/images", json=PROMPT, headers={"Idempotency-Key": "a"})  # its file has been there for long
    assert dispatcher.delivery_s == took_s
    dispatcher.note_delivery(0.9)
    hurried = {**PROMPT, "budget": {"latency_ms": 2000}}
    assert client.post("/v1/images", json=hurried).json()["error"]["code"] == "deadline_unreachable"
    assert client.post("/v1/images", json={**PROMPT, "budget": {"latency_ms": 2400}}).status_code == 200
    # A slow answer does not lead to refusals for ever
    monkeypatch.setattr("service.running.dispatcher._DELIVERY_KEPT_S", -1.0)
    assert client.post("/v1/images", json=hurried).status_code == 200
