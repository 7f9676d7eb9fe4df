import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from service.app import build_dispatcher
from service.jobs.job import Job
from service.jobs.store import EventName, follow
from service.settings import Settings

WITHOUT_TORCH = """
import sys
import service.cli, service.serving
from fastapi.testclient import TestClient
from service.app import build_dispatcher, create_app
from service.settings import Settings

settings = Settings(worker=False, redis_url="redis://127.0.0.1:1/0", models="there,not")
app = create_app(settings, build_dispatcher(settings))
client = TestClient(app)
assert client.get("/openapi.json").status_code == 200
assert client.get("/healthz").status_code == 200
assert client.get("/readyz").status_code == 503
assert client.get("/v1/models").json() == {"object": "list", "data": []}
assert client.post("/v1/images", json={"prompt": "", "n": 9}).status_code == 422
refused = client.post("/v1/images", json={"prompt": "a", "model": "there"})
assert (refused.status_code, refused.json()["error"]["code"]) == (503, "model_unavailable"), refused.text
assert client.post("/admin/models/there/load").status_code == 404
heavy = {"torch", "diffusers", "transformers", "skimage", "cv2", "scipy", "trimesh", "onnxruntime", "fsspec"}
assert not heavy & {*sys.modules}, heavy & {*sys.modules}
"""


def test_api_node_imports_nothing_that_computes() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_TORCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_documentation_page_needs_nothing_from_outside(client: TestClient) -> None:
    page = client.get("/docs").text
    assert "https://" not in page
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png"):
        assert f"/static-offline-docs/{name}" in page
        assert client.get(f"/static-offline-docs/{name}").status_code == 200


def test_front_page_needs_nothing_from_outside(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "https://" not in page.text
    named = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    assert named
    for path in (*named, "/playground/mask.js", "/playground/vendor/model-viewer.min.js"):
        assert client.get(path).status_code == 200


def test_openapi_has_our_errors_and_only_what_works(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/images",
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/meshes",
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/events",
        "/v1/jobs/{job_id}/content",
        "/v1/models",
        "/v1/models/{model_id}",
        "/healthz",
        "/readyz",
        "/metrics",
    }
    create = document["paths"]["/v1/images"]["post"]
    refusals = {"400", "401", "403", "404", "408", "409", "413", "415", "422", "429", "500", "503"}
    assert set(create["responses"]) == {"200", "202", *refusals}
    stream = "text/event-stream"
    images = {"image/png", "image/webp", "image/jpeg"}
    assert set(create["responses"]["200"]["content"]) == {"application/json", stream, *images}
    for status, response in create["responses"].items():
        if status in refusals:
            schema = response["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorBody"}
    mesh = document["paths"]["/v1/meshes"]["post"]
    assert set(mesh["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    mesh_types = {"model/gltf-binary", "model/obj", "model/stl", "application/ply"}
    assert set(mesh["responses"]["200"]["content"]) == {"application/json", stream, *mesh_types}
    schemas = document["components"]["schemas"]
    assert "HTTPValidationError" not in schemas
    assert "422" not in document["paths"]["/v1/jobs/{job_id}"]["get"]["responses"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/images", 405, "method_not_allowed"),
        ("GET", "/static-offline-docs/nothing.js", 404, "not_found"),
    ],
)
def test_unknown_paths_and_methods_have_our_shape(
    method: str, path: str, status: int, code: str, client: TestClient
) -> None:
    response = client.request(method, path, follow_redirects=False)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert set(response.json()) == {"error"}


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/images", "POST"),
        ("PUT", "/v1/jobs/job_1", "GET, HEAD, DELETE"),  # two routes share the path
        ("OPTIONS", "/v1/jobs/job_1", "GET, HEAD, DELETE"),
        ("DELETE", "/v1/jobs/job_1/content", "GET, HEAD"),
        ("POST", "/healthz", "GET, HEAD"),
        ("POST", "/playground/style.css", "GET, HEAD"),
    ],
)
def test_wrong_method_says_which_are_allowed(method: str, path: str, allowed: str, client: TestClient) -> None:
    response = client.request(method, path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)


@pytest.mark.anyio
async def test_events_and_their_previews_are_kept_for_minutes_only(make_job: Callable[..., Job]) -> None:
    now = [0.0]
    store = build_dispatcher(Settings(), lambda: pytest.fail("no engine is needed"), clock=lambda: now[0]).store
    await store.add(make_job("a"))
    await store.cancel("a")
    now[0] = 290.0
    assert [event.name for event in await store.events("a", "0-0")] == [EventName.QUEUED, EventName.ENDED]
    now[0] = 310.0
    assert await store.events("a", "0-0") == []
    assert [event.name async for event in follow(store, "a")] == [EventName.ENDED]
