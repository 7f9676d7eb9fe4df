from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.jobs.job import Job
from service.settings import Settings
from service.worker import Worker


def test_finished_job_shows_its_receipt_and_content(client: TestClient) -> None:
    answer = client.post("/v1/images", json={"prompt": "a", "n": 2}).json()
    job = client.get(f"/v1/jobs/{answer['id']}").json()
    links = job.pop("links")
    assert job == {
        "id": answer["id"],
        "object": "job",
        "status": "succeeded",
        "model": "drawn",
        "created": answer["created"],
        "progress": {"step": 4, "num_inference_steps": 4},
        "receipt": answer["receipt"],
        "error": None,
    }
    assert client.get(links["self"]).json()["id"] == answer["id"]
    assert [client.get(link).status_code for link in links["content"]] == [200, 200]


def test_running_job_shows_its_progress(
    client: TestClient, worker: Worker, engine: Any, make_job: Callable[..., Job]
) -> None:
    engine.gate.clear()
    ended = worker.submit(make_job("a"))
    assert engine.stepping.wait(20)
    job = client.get("/v1/jobs/a").json()
    assert (job["status"], job["progress"]["step"], job["receipt"]) == ("running", 0, None)
    assert job["links"]["content"] == []
    response = client.get("/v1/jobs/a/content")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "job_not_finished"
    engine.gate.set()
    ended.result(20)


@pytest.mark.parametrize("path", ["/v1/jobs/nothing", "/v1/jobs/nothing/content"])
def test_unknown_job_is_not_found(path: str, client: TestClient) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "job_not_found"


@pytest.mark.parametrize("index", ["2", "-1", "x", "1e3"])
def test_index_must_be_of_a_picture(index: str, client: TestClient) -> None:
    job_id = client.post("/v1/images", json={"prompt": "a", "n": 2}).json()["id"]
    response = client.get(f"/v1/jobs/{job_id}/content?index={index}")
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "index"


def test_result_that_is_no_longer_kept_is_gone(start_worker: Callable[[Settings], Worker], settings: Settings) -> None:
    small = settings.model_copy(update={"max_result_bytes": 10})
    client = TestClient(create_app(small, start_worker(small)))
    job_id = client.post("/v1/images", json={"prompt": "a"}).json()["id"]
    response = client.get(f"/v1/jobs/{job_id}/content")
    assert response.status_code == 410
    assert response.json()["error"]["code"] == "result_expired"
    assert client.get(f"/v1/jobs/{job_id}").status_code == 200


def test_content_has_a_file_name(client: TestClient, worker: Worker, make_job: Callable[..., Job]) -> None:
    worker.submit(replace(make_job("a"), id="job_1")).result(20)
    response = client.get("/v1/jobs/job_1/content")
    assert response.headers["content-disposition"] == 'inline; filename="job_1-0.png"'
