from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.errors import JobUnreadable
from service.settings import Settings
from tests.fixtures.waiting import wait_until

ASYNC = {"Prefer": "respond-async"}


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
        "queue": None,
        "progress": {"step": 4, "num_computed_steps": 4, "num_inference_steps": 4},
        "receipt": answer["receipt"],
        "error": None,
    }
    assert client.get(links["self"]).json()["id"] == answer["id"]
    assert [client.get(link).status_code for link in links["content"]] == [200, 200]


def test_running_job_shows_its_progress(client: TestClient, engine: Any) -> None:
    engine.gate.clear()
    accepted = client.post("/v1/images", json={"prompt": "a"}, headers={"Prefer": "respond-async"})
    assert engine.stepping.wait(20)
    job = client.get(accepted.headers["location"]).json()
    assert (job["status"], job["progress"]["step"], job["receipt"]) == ("running", 0, None)
    assert job["links"]["content"] == []
    response = client.get(accepted.headers["location"] + "/content")
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "job_not_finished"
    engine.gate.set()


def test_queued_job_shows_its_place_and_when_it_will_have_ended(
    start_client: Callable[..., TestClient], settings: Settings, engine: Any
) -> None:
    client = start_client(settings.model_copy(update={"max_running": 1}))
    wait_until(lambda: 'elastic_workers{model="drawn",state="idle"} 1.0' in client.get("/metrics").text)
    engine.gate.clear()
    running = client.post("/v1/images", json={"prompt": "a"}, headers=ASYNC).json()
    assert engine.stepping.wait(20)
    first, last = (client.post("/v1/images", json={"prompt": "a"}, headers=ASYNC).json() for _ in range(2))
    assert [job["queue"]["position"] for job in (first, last)] == [0, 1]
    assert client.get(f"/v1/jobs/{running['id']}").json()["queue"] is None
    shown = [client.get(f"/v1/jobs/{job['id']}").json() for job in (first, last)]
    assert [job["queue"]["position"] for job in shown] == [0, 1]
    assert 0 < shown[0]["queue"]["eta_s"] < shown[1]["queue"]["eta_s"]
    # A job of high priority comes first.
    urgent = client.post("/v1/images", json={"prompt": "a", "priority": "high"}, headers=ASYNC).json()
    assert urgent["queue"]["position"] == 0
    assert [job["queue"] and job["queue"]["position"] for job in client.get("/v1/jobs").json()["data"]] == [
        0,
        2,
        1,
        None,
    ]
    engine.gate.set()


def test_jobs_are_listed_page_by_page_from_the_newest(client: TestClient) -> None:
    assert client.get("/v1/jobs").json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    made = [client.post("/v1/images", json={"prompt": "a"}).json()["id"] for _ in range(5)]
    newest = made[::-1]
    pages: list[dict[str, Any]] = []
    after = None
    while not pages or pages[-1]["has_more"]:
        pages.append(client.get("/v1/jobs", params={"limit": 2, **({"after": after} if after else {})}).json())
        after = pages[-1]["last_id"]
    assert [[job["id"] for job in page["data"]] for page in pages] == [newest[:2], newest[2:4], newest[4:]]
    assert [page["first_id"] for page in pages] == newest[::2]
    assert client.get("/v1/jobs", params={"limit": 5}).json()["has_more"] is False
    assert client.get("/v1/jobs", params={"after": made[0]}).json()["data"] == []


def test_listed_jobs_are_as_shown_but_for_their_decisions(client: TestClient) -> None:
    made = client.post("/v1/images", json={"prompt": "a", "trace": True}).json()["id"]
    shown = client.get(f"/v1/jobs/{made}").json()
    assert shown["receipt"].pop("decisions")
    assert client.get("/v1/jobs").json()["data"] == [shown]


@pytest.mark.parametrize(
    ("query", "status", "code", "param"),
    [
        ("limit=0", 422, "invalid_parameter", "limit"),
        ("limit=101", 422, "invalid_parameter", "limit"),
        ("limit=many", 422, "invalid_parameter", "limit"),
        ("all=perhaps", 422, "invalid_parameter", "all"),
        ("after=job_1", 404, "job_not_found", None),
        ("after=job_1:picture", 404, "job_not_found", None),
        ("after=", 404, "job_not_found", None),
    ],
)
def test_bad_queries_of_the_list_are_refused(
    query: str, status: int, code: str, param: str | None, client: TestClient
) -> None:
    response = client.get(f"/v1/jobs?{query}")
    assert response.status_code == status
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == (code, param)


@pytest.mark.parametrize("path", ["/v1/jobs/nothing", "/v1/jobs/nothing/content", "/v1/jobs/nothing/events"])
def test_unknown_job_is_not_found(path: str, client: TestClient) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "job_not_found"


@pytest.mark.parametrize("index", ["2", "-1", "x", "1e3"])
def test_index_must_be_that_of_an_image(index: str, client: TestClient) -> None:
    job_id = client.post("/v1/images", json={"prompt": "a", "n": 2}).json()["id"]
    response = client.get(f"/v1/jobs/{job_id}/content?index={index}")
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "index"


def test_deleted_result_is_answered_410(start_client: Callable[..., TestClient], settings: Settings) -> None:
    client = start_client(settings.model_copy(update={"max_result_bytes": 10}))
    job_id = client.post("/v1/images", json={"prompt": "a"}).json()["id"]
    assert client.get(f"/v1/jobs/{job_id}/content").status_code == 200
    client.post("/v1/images", json={"prompt": "a"})
    response = client.get(f"/v1/jobs/{job_id}/content")
    assert response.status_code == 410
    assert response.json()["error"]["code"] == "result_expired"
    assert client.get(f"/v1/jobs/{job_id}").status_code == 200


def test_content_has_a_file_name(client: TestClient) -> None:
    job_id = client.post("/v1/images", json={"prompt": "a"}).json()["id"]
    response = client.get(f"/v1/jobs/{job_id}/content")
    assert response.headers["content-disposition"] == f'inline; filename="{job_id}-0.png"'


@pytest.mark.parametrize("job_id", ["job_1:picture", "job%3A1", "..%2F..", "ä", "x" * 65, "a b"])
def test_no_other_key_of_the_store_is_a_job(job_id: str, client: TestClient) -> None:
    assert client.get(f"/v1/jobs/{job_id}").status_code == 404
    assert client.delete(f"/v1/jobs/{job_id}").status_code == 404


def test_job_that_cannot_be_read_is_answered_as_failed(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def get(job_id: str) -> None:
        raise JobUnreadable(job_id)

    monkeypatch.setattr(client.app.state.dispatcher.store, "get", get)
    response = client.get("/v1/jobs/job_1")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "generation_failed"
    assert "job_1" in response.json()["error"]["message"]
