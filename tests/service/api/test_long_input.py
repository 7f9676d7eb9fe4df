"""Errors repeat no more than the beginning of what a client sent."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

LONG = "x" * 15_000
DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
PROMPT = {"prompt": "a"}
JSON = "application/json"


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/images", PROMPT), ("/v1/images/edits", {**PROMPT, "image": "aa"}), ("/v1/meshes", {"input_image": "aa"})],
)
@pytest.mark.parametrize(
    "fields",
    [
        *({name: LONG} for name in ("model", "budget", "seed", "priority", "output_format", "response_format", LONG)),
        *({name: LONG} for name in ("num_inference_steps", "guidance_scale", "stream", "trace", "webhook_url")),
        *({name: int("9" * 4000)} for name in ("num_inference_steps", "seed", "octree_resolution", "width")),
        {"width": int("9" * 4000), "height": int("9" * 4000)},
        {"size": LONG},
        {"size": "64x64", "width": int("9" * 4000), "height": 16},
        {"budget": {LONG: 1}},
        {"budget": {"preset": LONG}},
        {"budget": {"compute_ratio": LONG}},
        {"budget": {"quality": [LONG]}},
        {"budget": {f"unknown {number}": 1 for number in range(900)}},
        {"budget": DEEP},
        {"seed": DEEP},
        {"\ud800" * 1000: 1},
        {"remove_background": LONG, "quality": LONG, "background": LONG},
        {"prompt": 9, "input_image": [LONG]},
        {"image": [LONG] * 17, "prompt": 9},
        {"images": [{LONG: 1}], "prompt": 9},
        {"mask": {"image_url": [LONG]}, "strength": LONG},
    ],
    ids=lambda fields: f"{next(iter(fields))[:20]}={str(next(iter(fields.values())))[:20]}",
)
def test_long_fields_are_refused_briefly(
    client: TestClient, path: str, body: dict[str, Any], fields: dict[str, Any]
) -> None:
    response = client.post(path, content=json.dumps({**body, **fields}), headers={"Content-Type": JSON})
    assert 400 <= response.status_code < 500, response.text
    assert len(response.text) < 700
    assert len(str(response.json()["error"]["param"])) < 100


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", f"/v1/models/{LONG}", {}, 404),
        ("GET", f"/v1/jobs/{LONG}", {}, 404),
        ("DELETE", f"/v1/jobs/{LONG}", {}, 404),
        ("GET", f"/v1/jobs/a/content?index={LONG}", {}, 422),
        ("GET", "/v1/jobs/a/events", {"Last-Event-ID": LONG}, 422),
        ("GET", f"/{LONG}", {}, 404),
        ("POST", "/v1/images", {"Content-Type": LONG}, 415),
        ("POST", "/v1/images/edits", {"Content-Type": LONG}, 415),
        ("POST", "/v1/meshes", {"Content-Type": LONG}, 415),
        ("POST", "/v1/images", {"Content-Type": JSON, "Content-Encoding": LONG}, 415),
        ("POST", "/v1/images", {"Content-Type": JSON, "Idempotency-Key": LONG}, 422),
        ("POST", "/v1/images", {"Content-Type": JSON, "Prefer": LONG}, 200),
        ("POST", "/v1/meshes", {"Content-Type": f"multipart/form-data; boundary={LONG}"}, 415),
    ],
)
def test_long_paths_and_headers_are_answered_briefly(
    client: TestClient, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    response = client.request(method, path, content='{"prompt": "a"}', headers=headers)
    assert response.status_code == status
    assert status == 200 or len(response.text) < 700


def test_compressed_bodies_are_refused_by_their_encoding(client: TestClient) -> None:
    for path in ("/v1/images", "/v1/images/edits", "/v1/meshes"):
        response = client.post(path, json=PROMPT, headers={"Content-Encoding": "gzip"})
        assert response.status_code == 415
        assert "Content-Encoding 'gzip'" in response.json()["error"]["message"]
    assert client.post("/v1/images", json=PROMPT, headers={"Content-Encoding": "identity"}).status_code == 200
