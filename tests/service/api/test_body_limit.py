import contextlib
import logging
import socket
import time
from collections.abc import Callable
from http.client import HTTPConnection

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message

from service.api.connections import BoundedProtocol
from service.app import create_app
from service.keys import Scope, new_key
from service.running.dispatcher import Dispatcher
from service.settings import Settings
from tests.fixtures.waiting import wait_until

PATH = "/v1/images/generations"
NUM_BYTES = 8_000_000
HEAD = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def read_all(connection: socket.socket) -> str:
    """All that the server sends until it closes the connection, which it must do within the socket's timeout."""
    received = b""
    with contextlib.suppress(ConnectionResetError):  # it had not read what was sent
        while chunk := connection.recv(65536):
            received += chunk
    return received.decode()


def drip(connection: socket.socket, chunk: bytes, *, seconds: float) -> float:
    """Send `chunk` repeatedly until the server stops listening or the time is over. Returns the seconds that took."""
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < seconds:
            connection.sendall(chunk)
            time.sleep(0.02)
    return time.monotonic() - began


def test_long_body_is_refused_while_it_is_read(small: TestClient) -> None:
    long = b'{"prompt": "' + b"x" * 30_000 + b'"}'
    chunks = (long[start : start + 1000] for start in range(0, len(long), 1000))
    for content in (long, chunks):
        response = small.post(PATH, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "payload_too_large"
        assert "20000 bytes" in response.json()["error"]["message"]


def test_body_declared_too_long_is_refused_at_once(listen: Callable[[Settings], socket.socket]) -> None:
    connection = listen(Settings(max_body_bytes=20_000))
    connection.sendall(f"{HEAD}Content-Length: 20001\r\n\r\n".encode())
    answer = read_all(connection)
    assert answer.startswith("HTTP/1.1 413")
    assert "payload_too_large" in answer


def test_body_longer_than_it_declares_is_counted(small: TestClient) -> None:
    long = b'{"prompt": "' + b"x" * 30_000 + b'"}'
    response = small.post(PATH, content=long, headers={"Content-Type": "application/json", "Content-Length": "5"})
    assert response.status_code == 413


@pytest.mark.parametrize("line", [HEAD, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n"])
def test_body_of_two_lengths_is_refused(line: str, listen: Callable[[Settings], socket.socket]) -> None:
    connection = listen(Settings())
    connection.sendall(f"{line}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode())
    answer = read_all(connection)
    assert answer.startswith("HTTP/1.1 400")
    assert "invalid_request" in answer
    assert "Content-Length and Transfer-Encoding" in answer


def test_endless_body_is_cut_off(listen: Callable[[Settings], socket.socket]) -> None:
    connection = listen(Settings(max_body_bytes=20_000, body_timeout_s=0.3))
    connection.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
    assert drip(connection, b"1000\r\n" + b"x" * 0x1000 + b"\r\n", seconds=20) < 10


@pytest.mark.parametrize("line", ["GET /healthz", "POST /nowhere", "DELETE /v1/jobs/none"])
@pytest.mark.parametrize("length", ["Transfer-Encoding: chunked", f"Content-Length: {2**31}"])
def test_body_that_no_route_reads_is_cut_off(
    length: str, line: str, listen: Callable[[Settings], socket.socket]
) -> None:
    connection = listen(Settings(body_timeout_s=0.3))
    connection.sendall(f"{line} HTTP/1.1\r\nHost: localhost\r\n{length}\r\n\r\n".encode())
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


def test_body_without_a_valid_key_is_not_waited_for(listen: Callable[[Settings], socket.socket]) -> None:
    _, entry = new_key("a", [Scope.GENERATE])
    connection = listen(Settings(api_keys=f"[{entry.model_dump_json()}]"))
    connection.sendall(f"{HEAD}Content-Length: 15000\r\n\r\n".encode())
    assert read_all(connection).startswith("HTTP/1.1 401")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Authorization: Bearer wrong", 401),
        ("Sec-Fetch-Site: cross-site", 403),
        ("Authorization: Bearer {secret}", 413),
        ("Authorization: Bearer {secret}\r\nConnection: close", 413),
    ],
)
def test_client_that_sends_its_whole_body_first_gets_the_answer(
    headers: str, status: int, listen: Callable[[Settings], socket.socket]
) -> None:
    """Closing a connection with unread bytes resets it, and the client may lose the answer that it has not read yet."""
    secret, entry = new_key("a", [Scope.GENERATE])
    connection = listen(Settings(api_keys=f"[{entry.model_dump_json()}]"))
    connection.sendall(f"{HEAD}{headers.format(secret=secret)}\r\nContent-Length: {NUM_BYTES}\r\n\r\n".encode())
    connection.sendall(bytes(NUM_BYTES))
    answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(f"HTTP/1.1 {status}".encode())
    assert answer.endswith(b"}}")


@pytest.mark.parametrize(
    ("path", "media_type", "status"), [("/v1/images", "text/plain", 415), ("/v1/nowhere", "application/json", 404)]
)
def test_long_body_that_no_route_reads_is_answered(
    path: str, media_type: str, status: int, door: socket.socket, serve: Callable[[Settings], None]
) -> None:
    serve(Settings())
    with contextlib.closing(HTTPConnection(*door.getsockname())) as client:
        client.request("POST", path, bytes(NUM_BYTES), {"Content-Type": media_type})
        with client.getresponse() as response:
            assert response.status == status
            assert b'"error"' in response.read()


def test_only_so_many_bytes_are_read_after_an_answer(
    listen: Callable[[Settings], socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BoundedProtocol, "_bytes_to_drain", 1_000_000)
    connection = listen(Settings())
    connection.sendall(f"{HEAD}Content-Length: {2**40}\r\n\r\n".encode())
    with pytest.raises(ConnectionError):
        connection.sendall(bytes(50 * NUM_BYTES))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("path", "media_type", "begin"),
    [
        ("/v1/images", "application/json", b"{"),
        ("/v1/meshes", "application/json", b"{"),
        ("/v1/meshes", "multipart/form-data; boundary=b", b"--b"),
    ],
)
async def test_client_that_leaves_in_its_body_is_no_error(
    path: str,
    media_type: str,
    begin: bytes,
    make_dispatcher: Callable[[Settings], Dispatcher],
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dispatcher = make_dispatcher(settings)
    messages: list[Message] = [
        {"type": "http.request", "body": begin, "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", media_type.encode()), (b"host", b"localhost"), (b"content-length", b"20")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    await create_app(settings, dispatcher)(scope, receive, send)
    assert sent[0]["status"] == 499
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert dispatcher.worker.stop(20)


def test_bodies_are_limited_together(listen: Callable[[Settings], socket.socket]) -> None:
    # Given a request that has sent most of what all may send
    first = listen(Settings(max_held_body_bytes=100))
    first.sendall(f"{HEAD}Content-Length: 95\r\nExpect: 100-continue\r\n\r\n".encode())
    assert first.recv(1000).startswith(b"HTTP/1.1 100")  # its body is being read
    first.sendall(b'{"prompt": "' + b"x" * 68)

    # When another one sends a little
    def ask() -> int:
        with contextlib.closing(HTTPConnection(*first.getpeername())) as client:
            client.request("POST", PATH, '{"prompt": "aaaaaaaaa"}', {"Content-Type": "application/json"})
            with client.getresponse() as response:
                assert b"overloaded" in response.read() or response.status == 200
                return response.status

    # Then it is refused, until the first one is answered
    wait_until(lambda: ask() == 503)
    first.sendall(b"x" * 13 + b'"}')
    assert first.recv(1000).startswith(b"HTTP/1.1 200")
    assert ask() == 200


def test_body_in_time_is_served_and_the_connection_kept(listen: Callable[[Settings], socket.socket]) -> None:
    client = HTTPConnection("127.0.0.1")
    client.sock = connection = listen(Settings())
    for _ in range(2):
        client.request("POST", PATH, '{"prompt": "a"}', {"Content-Type": "application/json"})
        with client.getresponse() as response:
            assert response.status == 200
            response.read()
        assert client.sock is connection
