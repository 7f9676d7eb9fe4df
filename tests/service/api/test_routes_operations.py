from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.errors import StoreUnavailable
from tests.fixtures.waiting import wait_until


def test_running_server_is_alive_and_ready(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    of_each = {"workers": 1, "queued": 0}
    models = {"drawn": of_each, "guided": of_each, "ball": of_each}
    assert client.get("/readyz").json() == {"status": "ready", "models": models}


def test_draining_server_is_alive_but_not_ready(client: Any) -> None:
    client.portal.call(client.app.state.dispatcher.drain)
    assert client.get("/healthz").status_code == 200
    response = client.get("/readyz")
    assert response.status_code == 503
    assert response.json() == {"status": "unavailable", "reason": "the server is shutting down"}


def test_server_that_cannot_store_results_is_not_ready_and_takes_no_work(
    client: Any, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = client.app.state.dispatcher.store._results

    async def refuse(*arguments: Any) -> None:
        raise StoreUnavailable("the volume of results fails: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(results, "put", refuse)
        first = client.post("/v1/images", json={"prompt": "a"}, headers={"Prefer": "respond-async"})
        wait_until(lambda: client.get("/readyz").status_code == 503)
        assert "No space left" in client.get("/readyz").json()["reason"]
        assert client.get("/healthz").status_code == 200
        refused = client.post("/v1/images", json={"prompt": "b"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "store_unavailable"
        assert refused.headers["retry-after"]
    wait_until(lambda: client.get(first.headers["location"]).json()["status"] == "succeeded")
    wait_until(lambda: client.get("/readyz").status_code == 200)


def test_server_whose_volume_is_full_is_not_ready(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse() -> None:
        raise StoreUnavailable("the volume of results fails: No space left on device")

    monkeypatch.setattr(client.app.state.dispatcher.store._results, "check", refuse)
    response = client.get("/readyz")
    assert (response.status_code, response.json()["status"]) == (503, "unavailable")
    assert "No space left" in response.json()["reason"]


def test_metrics_count_what_was_done(client: TestClient) -> None:
    client.post("/v1/images", json={"prompt": "a", "budget": {"preset": "fast"}})
    client.post("/v1/images", json={"prompt": "break at step"})
    client.post("/v1/images", json={"prompt": "", "model": "x\ny"})
    client.post("/v1/images", json={"prompt": "a", "model": "secret-id"})
    response = client.get("/metrics", follow_redirects=False)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    for line in (
        'elastic_block_decisions_total{block="double.00",decision="run",model="drawn"} 4.0',
        'elastic_block_decisions_total{block="single.00",decision="skip",model="drawn"} 0.0',
        'elastic_block_latency_seconds_count{block="single.00",model="drawn"} 4.0',
        'elastic_block_mlp_width_ratio_count{block="single.00",model="drawn"} 4.0',
        'elastic_router_latency_seconds_count{model="drawn"} 4.0',
        'elastic_step_latency_seconds_count{model="drawn"} 4.0',
        'elastic_generation_batch_size_sum{model="drawn"} 4.0',
        'elastic_stage_latency_seconds_count{model="drawn",stage="encode"} 2.0',
        'elastic_stage_latency_seconds_count{model="drawn",stage="denoise"} 1.0',
        'elastic_stage_latency_seconds_count{model="drawn",stage="decode"} 1.0',
        'elastic_stage_latency_seconds_count{model="drawn",stage="output"} 1.0',
        'elastic_compute_ratio_sum{model="drawn"} 0.5',
        'elastic_predicted_compute_ratio_error_count{model="drawn"} 1.0',
        'elastic_requests_running{model="drawn"} 0.0',
        'elastic_requests_waiting{model="guided"} 0.0',
        'elastic_saving_results_total{decisions="run",model="drawn"} 1.0',
        'elastic_backlog_seconds{model="drawn"} 0.0',
        'elastic_wanted_workers{model="drawn"} 0.0',
        'elastic_workers{model="guided",state="draining"} 0.0',
        'elastic_request_queue_time_seconds_count{model="drawn"} 2.0',
        'elastic_e2e_request_latency_seconds_count{model="drawn",preset="fast"} 1.0',
        'elastic_requests_total{model="drawn",status="succeeded"} 1.0',
        'elastic_requests_total{model="drawn",status="failed"} 1.0',
        'elastic_requests_rejected_total{code="invalid_parameter",model=""} 1.0',
        'elastic_requests_rejected_total{code="model_not_found",model=""} 1.0',
    ):
        assert line in lines
    assert "secret-id" not in response.text


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_operators_pages_are_no_redirects(path: str, client: TestClient) -> None:
    assert client.get(path, follow_redirects=False).status_code == 200
