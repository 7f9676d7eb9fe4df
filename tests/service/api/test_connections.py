"""Connections that stand still, too many of them, and requests that are no HTTP, over real sockets."""

import asyncio
import errno
import json
import logging
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from service.api.connections import ConnectionErrors
from service.settings import Settings
from tests.fixtures.waiting import wait_until

NUM_LARGE_BYTES = 20_000_000
Listen = Callable[[Settings], socket.socket]
GET = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(first: socket.socket) -> socket.socket:
    return socket.create_connection(first.getpeername(), timeout=20)


def read_all(connection: socket.socket) -> bytes:
    """All that the server sends until it closes the connection, which it must do within the socket's timeout."""
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def ask(connection: socket.socket) -> bytes:
    """The status line of an answer on a connection that stays open; empty if the server has closed it."""
    answer = b""
    with suppress(ConnectionError):
        connection.sendall(GET)
        while not answer.endswith(b'"ok"') and (part := connection.recv(65536)):
            answer += part
    return answer.partition(b"\r\n")[0]


def error_of(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/json" in head
    error: dict[str, Any] = json.loads(body)["error"]
    return error


def test_headers_that_do_not_arrive_are_answered_408(listen: Listen) -> None:
    connection = listen(Settings(header_timeout_s=0.2))
    connection.sendall(GET[:-2])
    answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert (error_of(answer)["code"], "within 0.2 s" in error_of(answer)["message"]) == ("request_timeout", True)


def test_dripping_headers_do_not_prolong_their_time(listen: Listen) -> None:
    connection = listen(Settings(header_timeout_s=0.2))
    connection.settimeout(0.02)
    answer = b""
    for byte in b"GET /healthz HTTP/1.1\r\n" + b"a" * 1000:
        try:
            connection.sendall(bytes([byte]))
            answer = connection.recv(65536)
            break
        except TimeoutError:
            continue
    assert answer.startswith(b"HTTP/1.1 408")


def test_silent_connection_is_closed(listen: Listen) -> None:
    assert read_all(listen(Settings(header_timeout_s=0.2))) == b""


@pytest.mark.parametrize("rest", [GET[:20], b"x" * 100])
def test_connection_that_was_used_is_closed_too(listen: Listen, rest: bytes) -> None:
    """Also one that goes on with its body after the answer."""
    connection = listen(Settings(header_timeout_s=0.2))
    connection.sendall(GET if rest == GET[:20] else GET[:-2] + b"Content-Length: 1000\r\n\r\n")
    assert connection.recv(65536, socket.MSG_PEEK).startswith(b"HTTP/1.1 200")
    connection.sendall(rest)
    read_all(connection)


def test_time_of_headers_does_not_limit_bodies_and_answers(listen: Listen) -> None:
    connection = listen(Settings(header_timeout_s=0.2))
    connection.sendall(POST + b"Content-Length: 15\r\n\r\n")
    with connect(connection) as later:
        assert read_all(later) == b""  # the time of a connection that was made later is over
    connection.sendall(b'{"prompt": "a"}')
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_new_connection_takes_the_place_of_the_one_that_has_waited_longest(listen: Listen) -> None:
    first = listen(Settings(max_connections=2))
    with connect(first) as second, connect(first) as third:
        assert ask(third) == ask(second) == b"HTTP/1.1 200 OK"
        assert ask(first) == b""


def test_new_connection_takes_the_place_of_one_that_sends_after_its_answer(listen: Listen) -> None:
    first = listen(Settings(max_connections=1, max_body_bytes=10))
    first.sendall(POST + b"Content-Length: 1000\r\n\r\n")
    assert read_all(first).startswith(b"HTTP/1.1 413")
    first.sendall(b"x")  # it could go on for long
    with connect(first) as second:
        assert ask(second) == b"HTTP/1.1 200 OK"


def test_connection_beyond_the_limit_is_refused_if_all_are_at_work(listen: Listen) -> None:
    first = listen(Settings(max_connections=1))
    first.sendall(POST + b"Content-Length: 15\r\nExpect: 100-continue\r\n\r\n")
    assert first.recv(65536).startswith(b"HTTP/1.1 100")  # the request is at work
    with connect(first) as second:
        answer = read_all(second)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1" in answer.lower()
    assert error_of(answer)["code"] == "overloaded"
    first.sendall(b'{"prompt": "a"}')
    assert first.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        GET[:-2] + b"A: " + b"x" * 200_000 + b"\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n",
    ],
    ids=["no request", "no host", "long header", "no chunk", "two lengths"],
)
def test_what_is_not_http_is_answered_with_the_error_object(listen: Listen, request_bytes: bytes) -> None:
    connection = listen(Settings())
    connection.sendall(request_bytes)
    answer = b""
    while b"\r\n\r\n" not in answer or not answer.endswith(b"}"):
        answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 400")
    assert error_of(answer)["code"] == "invalid_request"


def test_client_that_reads_nothing_is_dropped(listen: Listen) -> None:
    first = listen(Settings(send_timeout_s=0.1, header_timeout_s=1))
    with socket.socket() as deaf:
        deaf.settimeout(20)
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(first.getpeername())
        deaf.sendall(GET.replace(b"/healthz", b"/large"))
        assert deaf.recv(1)
        with connect(first) as later:
            assert read_all(later) == b""  # the server's timers of a tenth of a second have run meanwhile
        assert len(read_all(deaf)) < NUM_LARGE_BYTES


def test_errors_of_connections_are_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    loop, errors = asyncio.new_event_loop(), ConnectionErrors()
    for _ in range(1000):
        errors.handle(loop, {"message": "no files", "exception": OSError(errno.EMFILE, "Too many open files")})
        errors.handle(loop, {"message": "a bug", "exception": ValueError("the first of many")})
        errors.handle(loop, {"message": "no exception"})
    assert [record.message.split(":")[0] for record in caplog.records] == [
        *("new connections have to wait", "a bug", "no exception")
    ]
    loop.close()


def test_more_connections_than_file_descriptors_are_warned_of(listen: Listen, caplog: pytest.LogCaptureFixture) -> None:
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert ask(listen(Settings(max_connections=num_files))) == b"HTTP/1.1 200 OK"
    assert f"lower it to {num_files - 128}" in caplog.text


@contextmanager
def no_more_files() -> Iterator[None]:
    """Let this process open no more files than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as highest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno(), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_wait_while_there_are_no_file_descriptors(listen: Listen, caplog: pytest.LogCaptureFixture) -> None:
    first = listen(Settings())
    assert ask(first) == b"HTTP/1.1 200 OK"
    caplog.set_level(logging.ERROR)
    with socket.socket() as second:
        with no_more_files():
            second.connect(first.getpeername())
            wait_until(lambda: bool(caplog.records))
            assert ask(first) == b"HTTP/1.1 200 OK"
        second.settimeout(20)
        assert ask(second) == b"HTTP/1.1 200 OK"
    assert len(caplog.records) == 1
