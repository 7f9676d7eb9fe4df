"""Jobs that nobody waits for, events, streams, idempotency keys and cancelling, over HTTP."""

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

import openai
import pytest
import trimesh
from fastapi.testclient import TestClient
from PIL import Image

from models.card import ImageCard
from service.settings import Settings
from tests.fixtures.waiting import wait_until

PROMPT: dict[str, Any] = {"prompt": "a red circle", "seed": 3}
ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def steps_are_held(engine: Any) -> Iterator[None]:
    engine.gate.clear()
    yield
    engine.gate.set()


@pytest.fixture
def mesh_body() -> dict[str, Any]:
    file = BytesIO()
    Image.new("RGB", (32, 32), (10, 20, 200)).save(file, "PNG")
    return {"input_image": base64.b64encode(file.getvalue()).decode(), "seed": 3}


def events_of(response: Any) -> list[tuple[str, str | None, dict[str, Any]]]:
    """(name, id, data) of each event in a stream."""
    events = []
    for part in response.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in part.split("\n") if not line.startswith(":"))
        if fields:
            events.append((fields["event"], fields.get("id"), json.loads(fields["data"])))
    return events


def test_async_call_answers_with_the_job(client: TestClient) -> None:
    response = client.post("/v1/images", json=PROMPT, headers=ASYNC)
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["preference-applied"] == "respond-async"
    assert response.headers["x-job-id"] == job["id"]
    assert job["status"] in ("queued", "running", "succeeded")
    assert job["links"]["events"] == f"http://testserver/v1/jobs/{job['id']}/events"
    events = events_of(client.get(job["links"]["events"]))
    assert events[-1][0] == "image_generation.completed"
    whole = client.post("/v1/images", json=PROMPT).json()
    assert events[-1][2]["data"] == whole["data"]
    content = client.get(f"/v1/jobs/{job['id']}/content").content
    assert base64.b64encode(content).decode() == whole["data"][0]["b64_json"]


def test_preference_may_wait_first(client: TestClient, engine: Any) -> None:
    assert client.post("/v1/images", json=PROMPT, headers={"Prefer": "respond-async, wait=20"}).status_code == 200
    engine.gate.clear()
    assert client.post("/v1/images", json=PROMPT, headers={"Prefer": "respond-async, wait=0"}).status_code == 202
    engine.gate.set()


@pytest.mark.parametrize(
    ("prefer", "status"),
    [
        ("norespond-async", 200),
        ("respond-asynchronously", 200),
        ('note="a, respond-async"', 200),
        ("foo=respond-async", 200),
        ("RESPOND-ASYNC", 202),
        ('foo; bar="a,b", respond-async; baz', 202),
        ("respond-async, wait=x", 202),
        ("respond-async, wait=0, wait=20", 202),
        ("respond-async, nowait=20", 202),
        ('respond-async, wait="20"', 200),
    ],
)
def test_preferences_are_whole_words(client: TestClient, engine: Any, prefer: str, status: int) -> None:
    if status == 202:
        engine.gate.clear()
    assert client.post("/v1/images", json=PROMPT, headers={"Prefer": prefer}).status_code == status
    engine.gate.set()


@pytest.mark.parametrize("name", ["image", "mesh"])
def test_stream_tells_progress_previews_and_the_result(
    name: str, client: TestClient, mesh_body: dict[str, Any]
) -> None:
    body = PROMPT if name == "image" else mesh_body
    response = client.post(
        f"/v1/{name}s".replace("meshs", "meshes"), json={**body, "stream": True, "partial_images": 2}
    )
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    names = [event[0] for event in events]
    assert names[:2] == ["job.queued", "job.started"]
    assert names[-1] == f"{name}_generation.completed"
    assert set(names) - {*names[:2], names[-1]} == {"job.progress", f"{name}_generation.partial_{name}"}
    assert all(data["type"] == event for event, _, data in events)
    progress = [data for event, _, data in events if event == "job.progress"]
    assert [entry["step"] for entry in progress] == sorted(entry["step"] for entry in progress)
    assert {"step", "num_computed_steps", "num_inference_steps", "compute_ratio", "eta_s"} <= set(progress[0])
    partial = [data for event, _, data in events if "partial" in event]
    assert [entry["partial_image_index"] for entry in partial] == [0, 1]
    for entry in partial:
        file = BytesIO(base64.b64decode(entry["b64_json"]))
        assert len(trimesh.load_mesh(file, "glb").faces) if name == "mesh" else Image.open(file).size == (8, 8)
    result = events[-1][2]
    assert result["b64_json"] == result["data"][0]["b64_json"]
    assert result["receipt"]["rule"] == "router"


def test_progress_counts_the_steps_that_a_deadline_leaves_to_compute(
    client: TestClient, forecasting_card: ImageCard
) -> None:
    # Given a deadline that seems to allow no more than the draft, which computes two of eight steps
    body = {**PROMPT, "model": forecasting_card.id, "budget": {"latency_ms": 1500}, "stream": True, "partial_images": 3}
    events = events_of(client.post("/v1/images", json=body))
    # When steps turn out to be much faster, four have been forecast, and all others are computed
    progress = [(data["step"], data["num_computed_steps"]) for name, _, data in events if name == "job.progress"]
    assert set(progress) <= {(1, 2), (2, 5), (3, 5), (4, 5), (5, 5)}  # progress that is soon outdated is left out
    assert progress[-1] == (5, 5)
    # Then previews and the job follow
    previews = [data["partial_image_index"] for name, _, data in events if name == "image_generation.partial_image"]
    assert previews == [0, 1, 2]
    job = client.get(f"/v1/jobs/{events[-1][2]['id']}").json()
    assert job["progress"] == {"step": 5, "num_computed_steps": 5, "num_inference_steps": 8}
    assert job["receipt"]["steps"] == {"computed": 5, "forecast": 3}


def test_event_that_is_yet_to_come_is_refused_before_the_job_ends(client: TestClient, steps_are_held: None) -> None:
    job_id = client.post("/v1/images", json=PROMPT, headers=ASYNC).json()["id"]
    assert client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": "99-0"}).status_code == 422


def test_openai_client_streams_unchanged(client: TestClient) -> None:
    sdk: Any = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client)
    events = list(sdk.images.generate(prompt="a", stream=True, partial_images=1))
    assert "image_generation.partial_image" in [event.type for event in events]
    assert events[-1].type == "image_generation.completed"
    assert Image.open(BytesIO(base64.b64decode(events[-1].b64_json))).size == (64, 64)


def test_openai_client_streams_several_images(client: TestClient) -> None:
    sdk: Any = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client)
    whole = sdk.images.generate(prompt="a", n=3, extra_body={"seed": 5})
    stream = sdk.images.generate(prompt="a", n=3, stream=True, extra_body={"seed": 5})
    events = [event for event in stream if event.type == "image_generation.completed"]
    assert [event.b64_json for event in events] == [image.b64_json for image in whole.data]
    assert sum(event.usage.total_tokens for event in events) == whole.usage.total_tokens


def test_stream_with_urls_holds_no_files(client: TestClient) -> None:
    result = events_of(client.post("/v1/images", json={**PROMPT, "stream": True, "response_format": "url"}))[-1][2]
    assert "b64_json" not in result
    assert client.get(result["url"]).status_code == 200


def test_failed_job_ends_its_stream_with_the_error(client: TestClient) -> None:
    events = events_of(client.post("/v1/images", json={"prompt": "break at step", "stream": True}))
    assert events[-1][0] == "error"
    assert events[-1][2]["error"]["code"] == "generation_failed"


def test_stream_resumes_after_the_last_event_that_arrived(client: TestClient) -> None:
    job_id = client.post("/v1/images", json=PROMPT, headers=ASYNC).json()["id"]
    path = f"/v1/jobs/{job_id}/events"
    events = events_of(client.get(path))
    rest = events_of(client.get(path, headers={"Last-Event-ID": str(events[1][1])}))
    assert rest == events[2:]
    at_end = client.get(path, headers={"Last-Event-ID": str(events[-1][1])})
    assert (at_end.status_code, at_end.text) == (204, "")  # which stops an EventSource
    beyond = f"{int(str(events[-1][1]).partition('-')[0]) + 1}-0"
    refused = client.get(path, headers={"Last-Event-ID": beyond})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "Last-Event-ID")
    assert f"{beyond} is after the job's last event, {events[-1][1]}" in refused.json()["error"]["message"]
    refused = client.get(path, headers={"Last-Event-ID": "yesterday"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "Last-Event-ID")


def test_stream_and_async_exclude_one_another(client: TestClient) -> None:
    response = client.post("/v1/images", json={**PROMPT, "stream": True}, headers=ASYNC)
    assert (response.status_code, response.json()["error"]["param"]) == (422, "stream")


def test_cancelled_job_ends_for_all_waiting_calls(client: TestClient, engine: Any, steps_are_held: None) -> None:
    with ThreadPoolExecutor(2) as pool:
        headers = {"Idempotency-Key": "k"}
        waiting = pool.submit(client.post, "/v1/images", json=PROMPT, headers=headers)
        assert engine.stepping.wait(20)
        job_id = client.post("/v1/images", json=PROMPT, headers={**headers, **ASYNC}).json()["id"]
        watching = pool.submit(client.get, f"/v1/jobs/{job_id}/events")
        for _ in range(2):  # idempotent
            response = client.delete(f"/v1/jobs/{job_id}")
            assert (response.status_code, response.json()["status"]) == (200, "cancelled")
        engine.gate.set()
        answer = waiting.result(20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "job_cancelled")
        assert events_of(watching.result(20))[-1][2]["error"]["code"] == "job_cancelled"
    assert client.get(f"/v1/jobs/{job_id}/content").status_code == 409
    assert len(engine.batches) <= 1


def test_job_that_has_ended_is_not_cancelled(client: TestClient) -> None:
    job_id = client.post("/v1/images", json=PROMPT).json()["id"]
    assert client.delete(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"
    assert client.get(f"/v1/jobs/{job_id}/content").status_code == 200


def test_cancel_frees_the_row_by_the_next_step_and_changes_no_companion(client: TestClient, engine: Any) -> None:
    alone = client.post("/v1/images", json={**PROMPT, "seed": 1, "num_inference_steps": 20}).json()["data"]
    engine.batches.clear()
    engine.gate.clear()
    engine.stepping.clear()
    with ThreadPoolExecutor(1) as pool:
        companion = pool.submit(client.post, "/v1/images", json={**PROMPT, "seed": 1, "num_inference_steps": 20})
        assert engine.stepping.wait(20)
        body = {**PROMPT, "seed": 2, "num_inference_steps": 20}
        unwanted = client.post("/v1/images", json=body, headers=ASYNC).json()["id"]
        wait_until(lambda: client.get(f"/v1/jobs/{unwanted}").json()["status"] == "running")
        engine.gate.set()
        while [1, 2] not in [sorted(batch) for batch in engine.batches]:
            assert not companion.done()
        client.delete(f"/v1/jobs/{unwanted}")
        at_cancel = len(engine.batches)
        assert companion.result(20).json()["data"] == alone
    assert all(batch == [1] for batch in engine.batches[at_cancel + 2 :])


def test_same_key_sent_fifty_times_at_once_makes_one_job(client: TestClient, engine: Any) -> None:
    with ThreadPoolExecutor(50) as pool:
        answers = list(
            pool.map(lambda _: client.post("/v1/images", json=PROMPT, headers={"Idempotency-Key": "k"}), range(50))
        )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.text for answer in answers}) == 1
    assert len(engine.started) == 1


def test_key_with_another_body_is_refused(client: TestClient, mesh_body: dict[str, Any]) -> None:
    headers = {"Idempotency-Key": "k"}
    assert client.post("/v1/images", json=PROMPT, headers=headers).status_code == 200
    for path, body in (("/v1/images", {**PROMPT, "seed": 4}), ("/v1/meshes", mesh_body)):
        response = client.post(path, json=body, headers=headers)
        assert response.status_code == 422
        assert response.json()["error"]["code"] == "idempotency_key_reused"
        assert response.json()["error"]["param"] == "Idempotency-Key"
    for key in ("", "x" * 256, "ä"):
        response = client.post("/v1/images", json=PROMPT, headers={b"Idempotency-Key": key.encode()})
        assert response.status_code == 422


def test_body_in_another_order_is_the_same_body(client: TestClient) -> None:
    headers = {"Idempotency-Key": "k"}
    answers = [
        client.post("/v1/images", json=body, headers=headers) for body in (PROMPT, dict(reversed(PROMPT.items())))
    ]
    assert answers[0].json()["id"] == answers[1].json()["id"]


def test_drained_server_ends_streams(start_client: Callable[..., Any], engine: Any, steps_are_held: None) -> None:
    client = start_client(Settings(grace_s=0))
    with ThreadPoolExecutor(2) as pool:
        watching = pool.submit(client.post, "/v1/images", json={**PROMPT, "stream": True})
        assert engine.stepping.wait(20)
        draining = pool.submit(client.portal.call, client.app.state.dispatcher.drain)
        engine.gate.set()
        draining.result(20)
        assert events_of(watching.result(20))[-1][2]["error"]["code"] == "draining"


def test_repeated_call_finds_its_job_on_an_overloaded_server(
    start_client: Callable[..., TestClient], engine: Any, steps_are_held: None
) -> None:
    client = start_client(Settings(max_backlog_s=3))
    body = {**PROMPT, "budget": {"preset": "exact"}}  # 2 s
    headers = {"Idempotency-Key": "k", **ASYNC}
    first = client.post("/v1/images", json=body, headers=headers)
    assert client.post("/v1/images", json=body, headers=ASYNC).status_code == 503
    again = client.post("/v1/images", json=body, headers=headers)
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])


def test_repeated_asynchronous_call_is_answered_with_the_ended_job(client: TestClient) -> None:
    headers = {"Idempotency-Key": "k"}
    done = client.post("/v1/images", json=PROMPT, headers=headers).json()
    again = client.post("/v1/images", json=PROMPT, headers={**headers, **ASYNC})
    assert (again.status_code, again.json()["id"], again.json()["status"]) == (202, done["id"], "succeeded")
