import pytest
from fastapi.testclient import TestClient
from starlette.datastructures import Headers

from service.api.middleware import request_id_of

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_request_id_is_echoed_or_made(client: TestClient) -> None:
    assert client.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {client.get(path).headers["x-request-id"] for path in ("/healthz", "/healthz", "/nowhere")}
    assert len(made) == 3


@pytest.mark.parametrize("given", ["", "two words", "é", "x" * 129])
def test_unfit_request_id_is_replaced(given: str) -> None:
    assert len(request_id_of(Headers({"X-Request-ID": given}))) == 32


def test_trace_id_names_the_request_where_nothing_else_does() -> None:
    assert request_id_of(Headers({"traceparent": TRACEPARENT})) == "0af7651916cd43dd8448eb211c80319c"
    assert request_id_of(Headers({"traceparent": TRACEPARENT, "X-Request-ID": "mine"})) == "mine"


def test_long_body_is_refused_while_it_is_read(client: TestClient) -> None:
    long = b'{"prompt": "' + b"x" * 30_000 + b'"}'
    chunks = (long[start : start + 1000] for start in range(0, len(long), 1000))
    for content in (long, chunks):
        response = client.post("/v1/images", content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "payload_too_large"
        assert "20000 bytes" in response.json()["error"]["message"]
