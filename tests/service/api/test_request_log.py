import logging
import socket
import time
from collections.abc import Callable
from http.client import HTTPConnection

import pytest
from fastapi.testclient import TestClient
from starlette.datastructures import Headers

from service.api.request_log import request_id_of
from service.logging import add_request_id
from service.settings import Settings

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PATH = "/v1/images/generations"


def test_request_id_is_echoed_or_created(small: TestClient) -> None:
    assert small.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {small.get(path).headers["x-request-id"] for path in ("/healthz", "/healthz", "/nowhere")}
    assert len(made) == 3


@pytest.mark.parametrize("given", ["", "two words", "é", "x" * 129])
def test_unfit_request_id_is_replaced(given: str) -> None:
    assert len(request_id_of(Headers({"X-Request-ID": given}))) == 32


def test_trace_id_is_the_request_id_if_there_is_no_other() -> None:
    assert request_id_of(Headers({"traceparent": TRACEPARENT})) == "0af7651916cd43dd8448eb211c80319c"
    assert request_id_of(Headers({"traceparent": TRACEPARENT, "X-Request-ID": "mine"})) == "mine"


def test_bug_is_logged_with_its_request_id(
    listen: Callable[[Settings], socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.addFilter(add_request_id)
    client = HTTPConnection("127.0.0.1")
    client.sock = listen(Settings())
    headers = {"Content-Type": "application/json", "X-Request-ID": "request-1"}
    client.request("POST", PATH, '{"prompt": "break"}', headers)
    with client.getresponse() as response:
        assert response.status == 500
        assert response.headers["X-Request-ID"] == "request-1"
    wait_until(lambda: "uvicorn.error" in [record.name for record in caplog.records if record.exc_info])
    caplog.handler.removeFilter(add_request_id)
    (line,) = [vars(record) for record in caplog.records if record.exc_info]
    assert line["request_id"] == "request-1"


def test_every_request_is_one_line_of_the_log_with_its_route(
    small: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service")
    small.get("/v1/jobs/job_7?token=s3cret")
    small.post(PATH, json={"prompt": "a"})
    small.post(PATH, json={"prompt": "break"})
    small.get("/s3cret")
    lines = [vars(record) for record in caplog.records if record.name == "service.api.request_log"]
    assert [(line["method"], line["route"], line["status"], line["job_id"]) for line in lines] == [
        ("GET", "/v1/jobs/{job_id}", 200, None),
        ("POST", PATH, 200, "job_1"),
        ("POST", PATH, 500, "job_1"),
        ("GET", "unknown", 404, None),
    ]
    assert all(line["seconds"] >= 0 for line in lines)
    assert "s3cret" not in caplog.text


def wait_until(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.01)
