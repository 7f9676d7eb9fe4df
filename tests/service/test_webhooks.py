import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from models.errors import InvalidRequest
from service.errors import BadConfiguration
from service.jobs.job import Job, JobSnapshot, JobState, JobStatus
from service.keys import Scope, new_key
from service.settings import Settings
from service.webhooks import Webhooks, check_webhook_url

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


class Listener:
    """A client's server. It answers with the next of `statuses`, at the end with 200."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.calls: list[tuple[dict[str, str], bytes]] = []
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                listener.calls.append(({name.lower(): value for name, value in self.headers.items()}, body))
                self.send_response(listener.statuses.pop(0) if listener.statuses else 200)
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.server.shutdown()
    listener.server.server_close()


@pytest.fixture
def ended_job(listener: Listener, make_job: Callable[..., Job]) -> JobSnapshot:
    job = replace(make_job("job_1"), webhook_url=f"http://{listener.host}/hook")
    return JobSnapshot(job, JobState(JobStatus.CANCELLED, ended_at=5.0))


def describe(snapshot: JobSnapshot) -> dict[str, str]:
    return {"id": snapshot.job.id, "status": snapshot.state.status}


def test_call_is_signed_as_the_standard_says(listener: Listener, ended_job: JobSnapshot) -> None:
    webhooks = Webhooks(SECRET, describe, clock=lambda: 1234.5)
    assert asyncio.run(webhooks.deliver(ended_job))
    ((headers, body),) = listener.calls
    signed = f"job_1.1234.{body.decode()}".encode()
    expected = base64.b64encode(hmac.digest(bytes(range(32)), signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert (headers["webhook-id"], headers["webhook-timestamp"]) == ("job_1", "1234")
    told = json.loads(body)
    assert told == {"type": "job.cancelled", "timestamp": 5, "data": {"id": "job_1", "status": "cancelled"}}


@pytest.mark.parametrize("status", [302, 404, 500])
def test_anything_but_success_is_a_failure_and_redirects_lead_nowhere(
    status: int, listener: Listener, ended_job: JobSnapshot
) -> None:
    listener.statuses = [status]
    assert not asyncio.run(Webhooks(SECRET, describe).deliver(ended_job))
    assert len(listener.calls) == 1


def test_unreachable_webhook_is_a_failure(ended_job: JobSnapshot) -> None:
    job = replace(ended_job.job, webhook_url="http://127.0.0.1:1/hook")
    assert not asyncio.run(Webhooks(SECRET, describe).deliver(replace(ended_job, job=job)))


@asynccontextmanager
async def answering(head: bytes, drip: bytes) -> AsyncIterator[str]:
    """The URL of a server that answers every call with `head`, and then with `drip` for as long as it is connected."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):  # on a busy machine the call may be over before it is sent
            await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        while drip and not writer.is_closing():
            writer.write(drip)
            with suppress(ConnectionError):
                await writer.drain()
            await asyncio.sleep(0.001)
        writer.close()

    async with asyncio.TaskGroup() as answers:
        server = await asyncio.start_server(
            lambda reader, writer: answers.create_task(answer(reader, writer)), "127.0.0.1", 0
        )
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"


@pytest.mark.parametrize(
    ("head", "drip", "is_success"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello", b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2000000000\r\n\r\n", b"x" * 100_000, True),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x", True),
        (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x", False),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", False),
        (b"HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n", b"", False),
        (b"HTTP/1.1 200 OK\r\nX-Large: " + b"x" * 1_000_000, b"", False),
        (b"SSH-2.0-OpenSSH_9.2\r\n", b"", False),
        (b"", b"", False),
    ],
)
@pytest.mark.anyio
async def test_no_answer_of_a_webhook_does_more_than_fail_its_call(
    head: bytes, drip: bytes, is_success: bool, ended_job: JobSnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.webhooks.DEADLINE_S", 1.0)
    async with answering(head, drip) as url:
        job = replace(ended_job.job, webhook_url=url)
        assert await Webhooks(SECRET, describe).deliver(replace(ended_job, job=job)) is is_success


@pytest.mark.anyio
async def test_job_that_cannot_be_described_is_a_failure(ended_job: JobSnapshot) -> None:
    assert not await Webhooks(SECRET, lambda _: {"set": {1}}).deliver(ended_job)


@pytest.mark.parametrize("secret", ["whsec_", "whsec_c2hvcnQ=", "whsec_???"])
def test_weak_secret_is_refused(secret: str) -> None:
    with pytest.raises(BadConfiguration, match="webhook_secret"):
        Webhooks(secret, describe)


@pytest.mark.parametrize(
    "url",
    [
        "https://evil.example/",
        "https://hooks.example.evil.example/",
        "https://hooks.example:444/",
        "https://hooks.example@evil.example/",
        "https://user@hooks.example/",
        "ftp://hooks.example/",
        "hooks.example/x",
        "https://hooks.example:99999/",
        "https://[::1/",
        "",
    ],
)
def test_only_allowed_hosts_are_called(url: str) -> None:
    check_webhook_url("https://hooks.example/a?b=c", ["hooks.example"])
    with pytest.raises(InvalidRequest, match="webhook_url"):
        check_webhook_url(url, ["hooks.example"])


def test_webhook_is_called_again_until_it_succeeds(
    start_client: Callable[..., TestClient], listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.running.webhook_calls.POLL_S", 0.02)
    monkeypatch.setattr("service.running.webhook_calls.RETRY_DELAYS_S", (0.01, 0.01))
    listener.statuses = [500, 500]
    secret, entry = new_key("a", [Scope.GENERATE])
    settings = Settings(
        webhook_hosts=(listener.host,),
        webhook_secret=SecretStr(SECRET),
        public_url="https://pictures.example/",
        api_keys=f"[{entry.model_dump_json()}]",
        link_secret=SecretStr("x" * 32),
    )
    client = start_client(settings)
    body = {"prompt": "a", "webhook_url": f"http://{listener.host}/hook"}
    job_id = client.post("/v1/images", json=body, headers={"Authorization": f"Bearer {secret}"}).json()["id"]
    deadline = time.monotonic() + 20
    while len(listener.calls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [headers["webhook-id"] for headers, _ in listener.calls] == [job_id] * 3
    told = json.loads(listener.calls[-1][1])["data"]
    assert told["receipt"]["rule"] == "router"
    assert told["links"]["self"] == f"https://pictures.example/v1/jobs/{job_id}"
    assert client.get(told["links"]["content"][0]).status_code == 200  # it is signed


def test_server_without_hosts_refuses_webhooks(client: TestClient) -> None:
    response = client.post("/v1/images", json={"prompt": "a", "webhook_url": "https://hooks.example/"})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "webhook_url")


def test_hosts_need_a_secret() -> None:
    with pytest.raises(ValueError, match="webhook_secret"):
        Settings(webhook_hosts=("hooks.example",))
