"""A budget is resolved in parsing, and nowhere after it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

import models.budget
from models.zoo import load_engine
from service.app import build_dispatcher, create_app
from service.settings import Settings

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # loads trained models

MODELS = tuple(ROOT / "checkpoints" / name for name in ("tiny-flux", "tiny-hunyuan3d"))


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    """The server and its worker, in this process."""
    weights = ROOT / "router_weights"
    settings = Settings(models=MODELS, router_weights=weights)
    dispatcher = build_dispatcher(settings, lambda: load_engine(MODELS, device="cpu", router_weights=weights))
    dispatcher.worker.start()
    with TestClient(create_app(settings, dispatcher)) as client:
        yield client


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The budgets that any module resolves."""
    resolve, calls = models.budget.resolve, []

    def counted(budget: Any, curve: Any) -> Any:
        calls.append(budget)
        return resolve(budget, curve)

    for module in list(sys.modules.values()):
        if vars(module).get("resolve") is resolve:
            monkeypatch.setattr(module, "resolve", counted)
    return calls


@pytest.mark.parametrize(
    "budget", [{"preset": "fast"}, {"quality": 0.9, "min_quality": 0.5}, {"compute_ratio": 0.5}, {"latency_ms": 60_000}]
)
def test_budget_of_an_image_is_resolved_once(client: TestClient, calls: list[Any], budget: dict[str, Any]) -> None:
    body = {"prompt": "a red circle", "n": 2, "num_inference_steps": 3, "budget": budget, "response_format": "url"}
    answer = client.post("/v1/images", json=body)
    assert answer.status_code == 200, answer.text
    assert len(calls) == 1


def test_budget_of_a_mesh_is_resolved_once(client: TestClient, calls: list[Any]) -> None:
    image = (ROOT / "docs/images/solid.png").read_bytes()
    fields = {"num_inference_steps": "2", "octree_resolution": "32", "budget": '{"preset": "fast"}'}
    answer = client.post("/v1/meshes", files={"input_image": ("solid.png", image)}, data=fields)
    assert answer.status_code == 200, answer.text
    assert len(calls) == 1
