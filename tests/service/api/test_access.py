from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Body, Depends, FastAPI
from fastapi.testclient import TestClient

from service.api.access import Access
from service.api.dependencies import CallerOfRequest
from service.api.errors import add_error_handlers
from service.api.middlewares import Middlewares
from service.keys import Scope, new_key
from service.settings import Settings

router = APIRouter(
    prefix="/v1/videos",
    dependencies=[Depends(Access(Scope.GENERATE, is_rate_limited=True, max_body_bytes=lambda _: 40))],
)


@router.post("/{name}")
async def create_video(name: str, caller: CallerOfRequest, body: Annotated[dict[str, Any], Body()]) -> dict[str, Any]:
    return {"name": name, "owner": caller.owner}


@pytest.fixture
def maker() -> tuple[str, str]:
    """The secret of a key, and the setting that knows it."""
    secret, entry = new_key("maker", [Scope.GENERATE])
    return secret, f"[{entry.model_dump_json()}]"


@pytest.fixture
def client(maker: tuple[str, str]) -> TestClient:
    """A server with an endpoint that no middleware knows of."""
    app = FastAPI()
    middlewares = Middlewares(Settings(api_keys=maker[1], rate_limit="2/minute"))
    app.include_router(router)
    middlewares.add_to(app, lambda code: None)
    add_error_handlers(app)
    return TestClient(app, headers={"Authorization": f"Bearer {maker[0]}"})


def test_new_endpoint_declares_its_rate_limit(client: TestClient) -> None:
    answers = [client.post("/v1/videos/a", json={}) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].json() == {"name": "a", "owner": "maker"}


def test_new_endpoint_declares_its_key(client: TestClient) -> None:
    response = client.post("/v1/videos/a", content=b"{", headers={"Authorization": "Bearer wrong"})
    assert response.status_code == 401  # before the body is read, which is not JSON
    assert response.headers["connection"] == "close"


def test_new_endpoint_declares_its_longest_body(client: TestClient) -> None:
    response = client.post("/v1/videos/a", json={"text": "x" * 40})
    assert response.status_code == 413
    assert "40 bytes" in response.json()["error"]["message"]


def test_path_without_a_route_is_not_counted(client: TestClient) -> None:
    for _ in range(3):
        assert client.post("/v1/nowhere", json={}).status_code == 404
    assert client.post("/v1/videos/a", json={}).status_code == 200
