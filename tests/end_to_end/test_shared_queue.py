"""Several processes share one Redis; some of them die."""

import base64
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.chaos.run import run
from benchmarks.chaos.verdict import MAX_DIFFERENCE
from benchmarks.processes import RedisServer
from tests.fixtures.forked_server import ForkedElasticDit
from tests.fixtures.waiting import wait_until

pytestmark = pytest.mark.redis

PROMPT: dict[str, Any] = {"prompt": "a red circle above a blue square", "seed": 7}
LONG: dict[str, Any] = {**PROMPT, "num_inference_steps": 30, "n": 2, "budget": {"preset": "exact"}}
ASYNC = {"Prefer": "respond-async"}
TIMEOUT_S = 300

Start = Callable[..., ForkedElasticDit]


@pytest.fixture
def start(redis_server: RedisServer, tmp_path: Path) -> Iterator[Start]:
    """Start a process on the shared Redis."""
    started: list[ForkedElasticDit] = []

    def begin(command: str, **environment: str) -> ForkedElasticDit:
        environment = {
            "ELASTIC_REDIS_URL": redis_server.url,
            "ELASTIC_MODELS": "checkpoints/tiny-flux",
            "ELASTIC_LEASE_S": "2",
            **environment,
        }
        started.append(ForkedElasticDit(command, tmp_path / f"{command}{len(started)}.log", **environment))
        return started[-1]

    yield begin
    for process in started:
        process.kill()


def wait_for(server: str, job_id: str, status: str) -> dict[str, Any]:
    def current() -> dict[str, Any]:
        job: dict[str, Any] = httpx2.get(f"{server}/v1/jobs/{job_id}", timeout=TIMEOUT_S).json()
        assert job["status"] in ("queued", "running", status), job
        return job

    wait_until(lambda: current()["status"] == status)
    return current()


def is_idle(process: ForkedElasticDit) -> bool:
    return 'elastic_requests_running{model="tiny-flux"} 0.0' in httpx2.get(f"{process.url}/metrics").text


def pixels_of(data: bytes) -> NDArray[np.int16]:
    with Image.open(BytesIO(data)) as opened:
        return np.asarray(opened.convert("RGB"), dtype=np.int16)


def image_file(server: str, job_id: str) -> bytes:
    return httpx2.get(f"{server}/v1/jobs/{job_id}/content").raise_for_status().content


def test_job_outlives_its_worker_and_is_seen_from_any_server(start: Start) -> None:
    """A worker dies in mid-job, another makes the image of the seed, and a second server streams its events."""
    first, second, worker = start("serve"), start("serve"), start("worker")
    urls = [process.wait_until_ready() for process in (first, second)]
    worker.wait_until_ready()
    assert httpx2.post(f"{worker.url}/v1/images", json=PROMPT).status_code == 404
    assert httpx2.get(f"{worker.url}/readyz").status_code == 200
    jobs = [httpx2.post(f"{urls[0]}/v1/images", json=LONG, headers=ASYNC).json()["id"] for _ in range(3)]
    for job_id in jobs:
        wait_for(urls[0], job_id, "running")
    worker.kill()
    first.kill()
    with httpx2.stream("GET", f"{urls[1]}/v1/jobs/{jobs[0]}/events", timeout=TIMEOUT_S) as stream:
        events = [line.removeprefix("event: ") for line in stream.iter_lines() if line.startswith("event: ")]
    assert events[-1] == "image_generation.completed"
    for job_id in jobs:
        wait_for(urls[1], job_id, "succeeded")
    alone = httpx2.post(f"{urls[1]}/v1/images", json={**LONG, "n": 1}, timeout=TIMEOUT_S).json()["data"][0]["b64_json"]
    expected = pixels_of(base64.b64decode(alone))
    for job_id in jobs:
        assert np.abs(pixels_of(image_file(urls[1], job_id)) - expected).max() <= MAX_DIFFERENCE


def test_drained_server_gives_unfinished_jobs_back(start: Start) -> None:
    first = start("serve", ELASTIC_GRACE_S="0")
    url = first.wait_until_ready()
    job_id = httpx2.post(f"{url}/v1/images", json=LONG, headers=ASYNC).json()["id"]
    wait_for(url, job_id, "running")
    assert first.stop() == 0
    url = start("serve").wait_until_ready()
    job = wait_for(url, job_id, "succeeded")
    assert job["progress"]["step"] == LONG["num_inference_steps"]
    assert image_file(url, job_id)


def test_cancel_reaches_the_worker_across_servers(start: Start) -> None:
    first, worker = start("serve", ELASTIC_MAX_RUNNING="1"), start("worker")
    url = first.wait_until_ready()
    worker.wait_until_ready()
    jobs = [
        httpx2.post(f"{url}/v1/images", json={**LONG, "seed": seed}, headers=ASYNC).json()["id"] for seed in range(4)
    ]
    for job_id in jobs:
        assert httpx2.delete(f"{url}/v1/jobs/{job_id}").json()["status"] == "cancelled"
    wait_until(lambda: is_idle(first) and is_idle(worker))


def test_api_node_serves_what_workers_hold(start: Start) -> None:
    """Two workers of different models behind a server without any; one dies with a job, the other loads its model."""
    api = start("serve", ELASTIC_WORKER="false", ELASTIC_MODELS="tiny-qwen-image,tiny-flux")
    url = api.wait_until_ready()
    with httpx2.Client(base_url=url, timeout=TIMEOUT_S) as client:

        def workers() -> dict[str, int]:
            return {model: found["workers"] for model, found in client.get("/readyz").json()["models"].items()}

        wait_until(lambda: workers() == {"tiny-qwen-image": 0, "tiny-flux": 0})  # those of earlier tests have gone
        assert client.get("/readyz").status_code == 503
        refused = client.post("/v1/images", json={**PROMPT, "model": "tiny-flux"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable")
        flux, qwen = start("worker"), start("worker", ELASTIC_MODELS="checkpoints/tiny-qwen-image")
        for process in (flux, qwen):
            process.wait_until_ready()
        wait_until(lambda: workers() == {"tiny-qwen-image": 1, "tiny-flux": 1})
        assert client.get("/readyz").status_code == 200
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny-qwen-image", "tiny-flux"]
        assert client.post("/v1/images", json={**PROMPT, "model": "tiny"}).status_code == 404
        for fields, model in (({"model": "tiny-flux"}, "tiny-flux"), ({}, "tiny-qwen-image")):
            made = client.post("/v1/images", json={**PROMPT, "budget": {"preset": "draft"}, **fields})
            assert (made.status_code, made.json()["model"]) == (200, model)
        job_id = client.post("/v1/images", json={**LONG, "n": 1, "model": "tiny-flux"}, headers=ASYNC).json()["id"]
        wait_for(url, job_id, "running")
        flux.kill()
        wait_until(
            lambda: workers()["tiny-flux"] == 0 and client.get(f"/v1/jobs/{job_id}").json()["status"] == "queued"
        )
        assert client.get("/readyz").json()["models"]["tiny-flux"] == {"workers": 0, "queued": 1}
        refused = client.post("/v1/images", json={**PROMPT, "model": "tiny-flux"})
        assert "no worker holds the model 'tiny-flux': the last one was seen" in refused.json()["error"]["message"]
        assert httpx2.post(f"{qwen.url}/admin/models/tiny-flux/load", timeout=TIMEOUT_S).status_code == 200
        wait_for(url, job_id, "succeeded")
        assert image_file(url, job_id)
    assert api.stop() == 0


@pytest.mark.slow
@pytest.mark.long
def test_nothing_is_lost_or_made_twice_whatever_fails() -> None:
    outcome = run(10, seed=5, mean_s=1, num_faults=3, num_servers=1, num_workers=1)
    assert outcome.faults == []
    assert outcome.befell.total() == 3
    assert outcome.statuses["succeeded"] >= 4
