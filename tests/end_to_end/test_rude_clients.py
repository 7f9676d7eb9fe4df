"""Clients that drip, flood, hang up or never read: other clients of the server notice nothing."""

import re
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from urllib.parse import urlsplit

import httpx2
import pytest

from examples.server_process import ElasticDit
from service.api.connections import DRAIN_BYTES
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.server

BODY_TIMEOUT_S = 3
# uvicorn stops reading after 64 KiB that the application has not asked for; the rest fills the buffers of two sockets.
BUFFERS_BYTES = 16_000_000
MEMORY_BYTES = 200_000_000
TIMEOUT_S = 300
JSON = {"Content-Type": "application/json"}
CHUNK = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ElasticDit]:
    environment = {
        "ELASTIC_MODELS": "checkpoints/tiny-flux",
        "ELASTIC_BODY_TIMEOUT_S": str(BODY_TIMEOUT_S),
        "ELASTIC_HEADER_TIMEOUT_S": str(BODY_TIMEOUT_S),
        "ELASTIC_SEND_TIMEOUT_S": str(TIMEOUT_S),
        "ELASTIC_MAX_BACKLOG_S": "100000",
    }
    process = ElasticDit("serve", tmp_path_factory.mktemp("server") / "log", **environment)
    ask_nicely(process.wait_until_ready())  # memory that the first request allocates does not count
    yield process
    process.kill()


def ask_nicely(url: str) -> None:
    """Five calls of a well-behaved client; all succeed."""
    with httpx2.Client(base_url=url, timeout=TIMEOUT_S) as client:
        for seed in range(5):
            body = {"prompt": "a red circle", "size": "64x64", "seed": seed, "num_inference_steps": 2}
            response = client.post("/v1/images", json=body)
            assert response.status_code == 200, response.text


@contextmanager
def memory_stays(process: ElasticDit, than: int | None = None) -> Iterator[None]:
    """The server's memory never rises by more than MEMORY_BYTES over `than`, by default what it has now."""
    before = memory_bytes(process, "VmRSS") if than is None else than
    yield
    assert memory_bytes(process, "VmHWM") - before < MEMORY_BYTES


def memory_bytes(process: ElasticDit, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{process.process.pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def connect(url: str, receive_buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    client.settimeout(TIMEOUT_S)
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    address = urlsplit(url)
    client.connect((address.hostname, address.port))
    return client


def head(line: str, *headers: str) -> bytes:
    return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def post(path: str, *headers: str) -> bytes:
    return head(f"POST {path}", "Content-Type: application/json", *headers)


def whole(body: str) -> bytes:
    return post("/v1/images", f"Content-Length: {len(body)}") + body.encode()


def answer_of(client: socket.socket) -> bytes:
    """Everything the server sends until it closes the connection."""
    parts = []
    try:
        while part := client.recv(65536):
            parts.append(part)
    except ConnectionError:  # closed while we were still sending
        pass
    return b"".join(parts)


def drip(url: str, start: bytes, is_over: Event, answers: list[bytes]) -> None:
    """Send `start`, then a byte a second; reconnect when cut off, until it `is_over`. Collects the answers."""
    while not is_over.is_set():
        with connect(url) as client:
            client.sendall(start)
            client.settimeout(1)  # a second for each byte, or less when an answer comes
            answer = b""
            while not is_over.is_set() and not answer:
                try:
                    client.sendall(b"x")
                    answer = client.recv(65536) or b"closed"
                except TimeoutError:
                    continue
                except ConnectionError:
                    answer = b"closed"
            answers.append(answer)


@pytest.mark.parametrize(
    "start",
    [
        post("/v1/images", "Content-Length: 1000"),
        post("/v1/images", "Transfer-Encoding: chunked") + b"400\r\n",
        head("POST /v1/meshes", "Content-Length: 1000", "Content-Type: multipart/form-data; boundary=b")
        + b'--b\r\nContent-Disposition: form-data; name="input_image"; filename="a"\r\n\r\n',
    ],
    ids=["declared", "chunked", "multipart"],
)
def test_body_of_a_byte_a_second_is_cut_off_and_delays_nobody(process: ElasticDit, start: bytes) -> None:
    is_over = Event()
    with ThreadPoolExecutor(8) as clients, memory_stays(process):
        answers_of_all: list[list[bytes]] = [[] for _ in range(8)]
        dripping = [clients.submit(drip, process.url, start, is_over, answers) for answers in answers_of_all]
        try:
            ask_nicely(process.url)
            wait_until(lambda: all(answers_of_all))  # each client is cut off at least once
        finally:
            is_over.set()
        for future in dripping:
            future.result()
        for answers in answers_of_all:
            assert answers[0].startswith(b"HTTP/1.1 408"), answers


def test_headers_of_a_byte_a_second_delay_nobody(process: ElasticDit) -> None:
    is_over = Event()
    start = b"POST /v1/images HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
    with ThreadPoolExecutor(8) as clients, memory_stays(process):
        answers_of_all: list[list[bytes]] = [[] for _ in range(8)]
        dripping = [clients.submit(drip, process.url, start, is_over, answers) for answers in answers_of_all]
        try:
            ask_nicely(process.url)
            wait_until(lambda: all(answers_of_all))
        finally:
            is_over.set()
        for future in dripping:
            future.result()
        for answers in answers_of_all:
            assert answers[0].startswith(b"HTTP/1.1 408"), answers


def flood(url: str, start: bytes, piece: bytes) -> tuple[int, bytes]:
    """Send `piece` again and again, up to 2 GiB. Returns the bytes that could be sent, and the answer."""
    num_bytes = 0
    with connect(url) as client:
        try:
            client.sendall(start)
            while num_bytes < 2**31:
                client.sendall(piece)
                num_bytes += len(piece)
        except ConnectionError:
            pass
        return num_bytes, answer_of(client)


@pytest.mark.parametrize(
    ("start", "piece", "limit", "status"),
    [
        (post("/v1/images", f"Content-Length: {2**31}"), b"x" * 0x10000, 0, b"413"),
        (post("/v1/images", "Transfer-Encoding: chunked"), CHUNK, 100_000, b"413"),
        (post("/v1/meshes", "Transfer-Encoding: chunked"), CHUNK, 32_000_000, b"413"),
        (post("/v1/nowhere", "Transfer-Encoding: chunked"), CHUNK, 0, b"404"),
        (post("/v1/nowhere", f"Content-Length: {2**31}"), b"x" * 0x10000, 0, b"404"),
        (head("GET /healthz", "Transfer-Encoding: chunked"), CHUNK, 0, b"200"),
        (head("DELETE /v1/jobs/none", f"Content-Length: {2**31}"), b"x" * 0x10000, 0, b"404"),
    ],
    ids=["declared", "chunked", "mesh", "nowhere", "declared to nowhere", "get", "delete"],
)
def test_two_gigabytes_are_not_read_to_their_end(
    process: ElasticDit, start: bytes, piece: bytes, limit: int, status: bytes
) -> None:
    with ThreadPoolExecutor(3) as clients, memory_stays(process):
        floods = [clients.submit(flood, process.url, start, piece) for _ in range(3)]
        ask_nicely(process.url)
        for num_bytes, answer in [future.result() for future in floods]:
            assert num_bytes < limit + DRAIN_BYTES + BUFFERS_BYTES
            # A client that is still sending when the connection is closed may lose the answer. On a busy machine, the
            # time for a body may end before the most that is read of it.
            assert answer == b"" or answer.split(b" ", 2)[1] in (status, b"408"), answer[:200]


LONG = '"prompt": "a red circle", "size": "64x64", "num_inference_steps": 100, "n": 3, "budget": {"preset": "exact"}'


def close(client: socket.socket) -> None:
    client.close()


def reset(client: socket.socket) -> None:
    """Close with RST, as a machine does after a restart."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("hang_up", [close, reset])
def test_job_of_a_client_that_hung_up_is_cancelled(
    process: ElasticDit, hang_up: Callable[[socket.socket], None]
) -> None:
    cancelled = 'elastic_requests_total{model="tiny-flux",status="cancelled"}'
    before = metric(process.url, cancelled)
    in_the_body, waiting, streaming = (connect(process.url) for _ in range(3))
    in_the_body.sendall(whole("{" + LONG + "}")[:-20])
    streaming.sendall(whole('{"stream": true, ' + LONG + "}"))  # first: of equal requests, the earlier one goes on
    received = b""
    while b"event: job.progress" not in received:
        received += streaming.recv(4096)
    waiting.sendall(whole("{" + LONG + "}"))
    for client in (in_the_body, waiting, streaming):
        hang_up(client)
    ask_nicely(process.url)
    wait_until(lambda: metric(process.url, cancelled) == before + 2)
    wait_until(lambda: metric(process.url, 'elastic_requests_running{model="tiny-flux"}') == 0)
    assert metric(process.url, 'elastic_requests_waiting{model="tiny-flux"}') == 0


@pytest.mark.long
def test_stream_that_its_client_does_not_read_delays_nobody(process: ElasticDit) -> None:
    fields = '"partial_images": 3, "trace": true, "prompt": "a ring", "size": "256x256", "num_inference_steps": 6'
    body = '{"stream": true, ' + fields + "}"
    succeeded = 'elastic_requests_total{model="tiny-flux",status="succeeded"}'
    # The memory that six of these jobs take together when their clients read.
    with ThreadPoolExecutor(6) as listeners:
        list(
            listeners.map(
                lambda _: httpx2.post(f"{process.url}/v1/images", content=body, headers=JSON, timeout=TIMEOUT_S),
                range(6),
            )
        )
    before = metric(process.url, succeeded)
    with ExitStack() as stack, memory_stays(process, than=memory_bytes(process, "VmHWM")):
        deaf: Sequence[socket.socket] = [stack.enter_context(connect(process.url, 4096)) for _ in range(6)]
        for client in deaf:
            client.sendall(whole(body))
        ask_nicely(process.url)
        wait_until(lambda: metric(process.url, succeeded) == before + 5 + 6)
        ask_nicely(process.url)


def metric(url: str, series: str) -> float:
    """The current value of a series; 0 if it does not exist yet."""
    page = httpx2.get(f"{url}/metrics", timeout=TIMEOUT_S).text
    found = re.search(rf"^{re.escape(series)} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0
