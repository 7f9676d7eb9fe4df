import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from threading import Thread

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.datastructures import Headers

from service.api.request_log import request_id_of
from service.keys import Scope, new_key
from service.logging import add_request_id
from service.settings import Settings

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PATH = "/v1/images/generations"
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.fixture
def small(build_small_app: Callable[[Settings], FastAPI]) -> Iterator[TestClient]:
    with TestClient(build_small_app(Settings(max_body_bytes=20_000)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def listen(build_small_app: Callable[[Settings], FastAPI]) -> Iterator[Callable[[Settings], socket.socket]]:
    """Serve a small application on a real socket, and connect to it."""
    with contextlib.ExitStack() as stack:

        def start(settings: Settings) -> socket.socket:
            door = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            config = uvicorn.Config(build_small_app(settings), log_config=None, access_log=False)
            server = uvicorn.Server(config)
            thread = Thread(target=asyncio.run, args=(server.serve(sockets=[door]),))
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(setattr, server, "should_exit", True)
            return stack.enter_context(socket.create_connection(door.getsockname(), timeout=20))

        yield start


def read_all(connection: socket.socket) -> str:
    """Until the server closes the connection, as it must, within the socket's timeout."""
    received = b""
    with contextlib.suppress(ConnectionResetError):  # it had not read what was sent
        while chunk := connection.recv(65536):
            received += chunk
    return received.decode()


def drip(connection: socket.socket, chunk: bytes, *, seconds: float) -> float:
    """Send `chunk` again and again, until the server stops listening or the time is over; how long that was."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < seconds:
            connection.sendall(chunk)
            time.sleep(0.02)
    return time.monotonic() - began


def wait_until(is_true: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_request_id_is_echoed_or_made(small: TestClient) -> None:
    assert small.get("/healthz", headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = {small.get(path).headers["x-request-id"] for path in ("/healthz", "/healthz", "/nowhere")}
    assert len(made) == 3


@pytest.mark.parametrize("given", ["", "two words", "é", "x" * 129])
def test_unfit_request_id_is_replaced(given: str) -> None:
    assert len(request_id_of(Headers({"X-Request-ID": given}))) == 32


def test_trace_id_names_the_request_where_nothing_else_does() -> None:
    assert request_id_of(Headers({"traceparent": TRACEPARENT})) == "0af7651916cd43dd8448eb211c80319c"
    assert request_id_of(Headers({"traceparent": TRACEPARENT, "X-Request-ID": "mine"})) == "mine"


def test_long_body_is_refused_while_it_is_read(small: TestClient) -> None:
    long = b'{"prompt": "' + b"x" * 30_000 + b'"}'
    chunks = (long[start : start + 1000] for start in range(0, len(long), 1000))
    for content in (long, chunks):
        response = small.post(PATH, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "payload_too_large"
        assert "20000 bytes" in response.json()["error"]["message"]


def test_body_that_says_that_it_is_too_long_is_not_waited_for(listen: Callable[[Settings], socket.socket]) -> None:
    connection = listen(Settings(max_body_bytes=20_000))
    connection.sendall(f"{HEAD}Content-Length: 20001\r\n\r\n".encode())
    answer = read_all(connection)
    assert answer.startswith("HTTP/1.1 413")
    assert "payload_too_large" in answer


def test_endless_body_is_cut_off(listen: Callable[[Settings], socket.socket]) -> None:
    connection = listen(Settings(max_body_bytes=20_000))
    connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
    assert drip(connection, b"1000\r\n" + b"x" * 0x1000 + b"\r\n", seconds=20) < 10


@pytest.mark.parametrize("line", ["GET /healthz", "POST /nowhere", "DELETE /v1/jobs/none"])
@pytest.mark.parametrize("length", ["Transfer-Encoding: chunked", f"Content-Length: {2**31}"])
def test_body_that_no_route_reads_is_cut_off(
    length: str, line: str, listen: Callable[[Settings], socket.socket]
) -> None:
    connection = listen(Settings())
    connection.sendall(f"{line} HTTP/1.1\r\nHost: a\r\n{length}\r\n\r\n".encode())
    assert drip(connection, b"1000\r\n" + b"x" * 0x1000 + b"\r\n", seconds=20) < 10


def test_dripping_body_is_answered_408_and_cut_off(listen: Callable[[Settings], socket.socket]) -> None:
    connection = listen(Settings(body_timeout_s=0.3))
    connection.sendall(f"{HEAD}Content-Length: 15000\r\n\r\n".encode())
    assert 0.2 < drip(connection, b"x", seconds=20) < 10
    answer = read_all(connection)
    assert not answer or (answer.startswith("HTTP/1.1 408") and "request_timeout" in answer)


def test_body_that_stops_is_answered_408(listen: Callable[[Settings], socket.socket]) -> None:
    connection = listen(Settings(body_timeout_s=0.3))
    connection.sendall(f"{HEAD}Content-Length: 15\r\n\r\n{{".encode())
    answer = read_all(connection)
    assert answer.startswith("HTTP/1.1 408")
    assert '"code":"request_timeout"' in answer
    assert "within 0.3 s" in answer


def test_body_of_a_stranger_is_not_waited_for(listen: Callable[[Settings], socket.socket]) -> None:
    _, entry = new_key("a", [Scope.GENERATE])
    connection = listen(Settings(api_keys=f"[{entry.model_dump_json()}]"))
    connection.sendall(f"{HEAD}Content-Length: 15000\r\n\r\n".encode())
    assert read_all(connection).startswith("HTTP/1.1 401")


def test_body_in_time_is_served_and_the_connection_kept(listen: Callable[[Settings], socket.socket]) -> None:
    client = HTTPConnection("127.0.0.1")
    client.sock = connection = listen(Settings())
    for _ in range(2):
        client.request("POST", PATH, '{"prompt": "a"}', {"Content-Type": "application/json"})
        with client.getresponse() as response:
            assert response.status == 200
            response.read()
        assert client.sock is connection


def test_bug_is_logged_with_the_request_that_met_it(
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


def test_answers_tell_browsers_what_not_to_do(small: TestClient) -> None:
    for response in (
        small.get("/healthz"),
        small.get("/docs"),
        small.get("/nowhere"),
        small.post(PATH, json={"prompt": "a"}),
        small.post(PATH, json={"prompt": "break"}),
    ):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["referrer-policy"] == "no-referrer"
    assert small.get("/page").headers["referrer-policy"] == "origin"  # a route knows better


def test_data_may_do_nothing_and_pages_what_they_bring_along(small: TestClient) -> None:
    assert small.get("/healthz").headers["content-security-policy"].startswith("default-src 'none'")
    page = small.get("/page").headers["content-security-policy"]
    assert "script-src 'self' 'unsafe-inline'" in page
    for response in (small.get("/healthz"), small.get("/page")):
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]


def test_what_somebody_made_is_not_stored_on_the_way(small: TestClient) -> None:
    for response in (small.get("/v1/jobs/a"), small.post(PATH, json={"prompt": "a"})):
        assert response.headers["cache-control"] == "no-store"
    assert "cache-control" not in small.get("/healthz").headers


def test_every_request_is_one_line_with_its_route(small: TestClient, caplog: pytest.LogCaptureFixture) -> None:
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
