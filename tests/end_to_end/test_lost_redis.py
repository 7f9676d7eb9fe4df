"""A server whose Redis dies or stops for a while: it reports that, loses no job, and recovers by itself."""

import os
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import httpx2
import pytest
from PIL import Image

from benchmarks.processes import RedisServer
from tests.fixtures.forked_server import ForkedElasticDit
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.redis

TIMEOUT_S = 300
LONG = {
    "prompt": "a red circle",
    "size": "64x64",
    "num_inference_steps": 60,
    "seed": 1,
    "budget": {"preset": "exact"},
}
SHORT = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 2}
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def client(own_redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx2.Client]:
    """A client of a server that keeps its jobs in `own_redis`."""
    environment = {"ELASTIC_REDIS_URL": own_redis.url, "ELASTIC_MODELS": "checkpoints/tiny-flux"}
    server = ForkedElasticDit("serve", tmp_path_factory.mktemp("server") / "log", **environment)
    with httpx2.Client(base_url=server.wait_until_ready(), timeout=TIMEOUT_S) as client:
        yield client
    server.kill()


def test_no_job_is_lost_when_redis_is_killed_while_it_runs(own_redis: RedisServer, client: httpx2.Client) -> None:
    with ThreadPoolExecutor(1) as others:
        waiting = others.submit(client.post, "/v1/images", json={**LONG, "n": 2})
        shorter = {**LONG, "num_inference_steps": 45}
        job = client.post("/v1/images", json=shorter, headers=ASYNC).json()["links"]["self"]
        wait_until(lambda: metric(client, "requests_running") == 2)
        own_redis.kill()

        readiness = client.get("/readyz")
        assert readiness.status_code == 503
        assert readiness.json()["status"] == "unavailable"
        assert "store" in readiness.json()["reason"]
        for refused in (client.post("/v1/images", json=SHORT), client.get(job), client.delete(job)):
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "store_unavailable"
            assert refused.headers["retry-after"]
        assert client.get("/healthz").status_code == 200
        assert client.get("/metrics").status_code == 200
        assert metric(client, "store_errors_total") > 0
        # The jobs go on; the shorter one ends while its status cannot be stored.
        wait_until(lambda: metric(client, 'stage_latency_seconds_count{model="tiny-flux",stage="output"}') >= 1)
        assert not waiting.done()

        own_redis.start()
        assert waiting.result().status_code == 200, waiting.result().text
    assert len(waiting.result().json()["data"]) == 2
    wait_until(lambda: client.get(job).json()["status"] == "succeeded")
    assert client.get(job).json()["receipt"]["compute_ratio"] == 1
    content = client.get(f"{job}/content").content
    assert Image.open(BytesIO(content)).size == (64, 64)
    wait_until(lambda: client.get("/readyz").status_code == 200)
    assert client.post("/v1/images", json=SHORT).status_code == 200


def test_no_call_hangs_while_redis_is_stopped(own_redis: RedisServer, client: httpx2.Client) -> None:
    with ThreadPoolExecutor(16) as others:
        waiting = others.submit(client.post, "/v1/images", json=LONG)
        wait_until(lambda: metric(client, "requests_running") == 1)
        with stopped(own_redis):
            readiness = others.submit(client.get, "/readyz")
            calls: list[Future[httpx2.Response]] = [
                *(others.submit(client.post, "/v1/images", json=SHORT) for _ in range(4)),
                *(others.submit(client.post, "/v1/images", json=SHORT, headers=ASYNC) for _ in range(4)),
                *(others.submit(client.get, path) for path in ("/metrics", "/v1/jobs/job_none")),
            ]
            assert client.get("/healthz").status_code == 200
            wait_until(readiness.done)  # it answers although Redis does not
            assert readiness.result().status_code == 503
        statuses = [call.result().status_code for call in calls]
        assert set(statuses) <= {200, 202, 404, 503}, statuses
        assert waiting.result().status_code == 200
    wait_until(lambda: client.get("/readyz").status_code == 200)
    assert client.post("/v1/images", json=SHORT).status_code == 200
    for call in calls:
        if call.result().status_code == 202:  # accepted jobs are generated
            job = call.result().json()["links"]["self"]
            wait_until(lambda job=job: client.get(job).json()["status"] == "succeeded")  # type: ignore[misc]


@contextmanager
def stopped(redis_server: RedisServer) -> Iterator[None]:
    """Redis keeps its connections open and answers nothing."""
    os.kill(redis_server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(redis_server.process.pid, signal.SIGCONT)


def metric(client: httpx2.Client, name: str) -> float:
    """The sum of the metric's series, or the one series whose labels `name` gives."""
    page: Any = client.get("/metrics").text
    series = re.findall(rf"^elastic_{re.escape(name)}(?:\{{.*\}})? (\S+)$", page, re.MULTILINE)
    return sum(map(float, series))
