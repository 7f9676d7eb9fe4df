"""HEAD wherever there is GET, and slashes at the end of paths."""

import contextlib
import socket
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.keys import Scope, new_key
from service.settings import Settings

PATHS = (
    *("/", "/docs", "/openapi.json", "/playground/style.css", "/healthz", "/readyz", "/metrics"),
    *("/v1/models", "/v1/models/", "/v1/models/drawn", "/v1/models/drawn/", "/v1/models/none"),
    *("/v1/jobs/{id}", "/v1/jobs/{id}/", "/v1/jobs/{id}/content", "/v1/jobs/{id}/content?index=9", "/v1/jobs/none"),
    *("/v1/jobs/{id}/events", "/v1/images", "/nowhere"),
)
OWN_TO_EACH_CALL = {"x-request-id", "date", "last-modified", "etag"}


def headers_of(response: Any) -> dict[str, str]:
    return {name: value for name, value in response.headers.items() if name not in OWN_TO_EACH_CALL}


@pytest.mark.parametrize("path", PATHS)
def test_head_is_get_without_a_body(path: str, client: TestClient) -> None:
    path = path.format(id=client.post("/v1/images", json={"prompt": "a"}).json()["id"])
    get, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    # The page of metrics counts the calls of itself, so its length differs.
    assert headers_of(head) == headers_of(get) or path == "/metrics"
    assert "content-length" in head.headers or path.endswith("/events")


def test_head_needs_the_key_that_get_needs(start_client: Callable[..., TestClient]) -> None:
    secret, entry = new_key("a", [Scope.METRICS])
    client = start_client(Settings(api_keys=f"[{entry.model_dump_json()}]"))
    headers = {"Authorization": f"Bearer {secret}"}
    for path, status, with_key in (("/v1/models", 401, 403), ("/metrics", 401, 200), ("/healthz", 200, 200)):
        assert client.head(path).status_code == status
        assert client.head(path, headers=headers).status_code == with_key


def test_head_of_the_events_of_a_running_job_opens_no_stream(client: TestClient, engine: Any) -> None:
    engine.gate.clear()
    location = client.post("/v1/images", json={"prompt": "a"}, headers={"Prefer": "respond-async"}).headers["location"]
    head = client.head(f"{location}/events")  # which would last as long as the stream
    assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert client.get(location).json()["status"] in ("queued", "running")
    engine.gate.set()


def test_connection_goes_on_after_head(door: socket.socket, serve: Callable[[Settings], None]) -> None:
    serve(Settings(grace_s=0))
    with contextlib.closing(HTTPConnection(*door.getsockname())) as client:
        for path in ("/v1/models", "/playground/playground.js", "/healthz"):
            for method in ("HEAD", "GET"):
                client.request(method, path)
                with client.getresponse() as response:
                    assert (response.status, response.read() == b"") == (200, method == "HEAD")
                    assert int(response.headers["content-length"]) > 0


def test_slash_at_the_end_means_nothing(client: TestClient) -> None:
    assert client.get("/v1/models/").json() == client.get("/v1/models").json()
    assert client.get("/v1/models/drawn/").json() == client.get("/v1/models/drawn").json()
    assert client.post("/v1/images/generations/", json={"prompt": "a"}, follow_redirects=False).status_code == 200
