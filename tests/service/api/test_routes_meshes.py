import base64
import json
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from threading import Thread
from typing import Any

import numpy as np
import pytest
import trimesh
from fastapi.testclient import TestClient
from httpx2 import Response
from PIL import Image

from models.file_formats import MeshFormat
from service.api.input_image import checked_image
from service.settings import Settings


@pytest.fixture(scope="module")
def image() -> bytes:
    file = BytesIO()
    Image.new("RGB", (32, 24), (200, 10, 20)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def make(client: TestClient, image: bytes) -> Callable[..., Response]:
    def make(**fields: Any) -> Response:
        body = {"input_image": base64.b64encode(image).decode(), "seed": 5, **fields}
        return client.post("/v1/meshes", json=body)

    return make


def opened(data: bytes, mesh_format: str = "glb") -> trimesh.Trimesh:
    mesh = trimesh.load(BytesIO(data), file_type=mesh_format, force="mesh")
    assert isinstance(mesh, trimesh.Trimesh)
    return mesh


def error_of(response: Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


def test_images_that_wait_are_bounded(start_client: Callable[..., TestClient], image: bytes, engine: Any) -> None:
    client = start_client(Settings(max_input_image_bytes=2 * len(checked_image(image, max_pixels=1000))))
    engine.gate.clear()
    body = {"input_image": base64.b64encode(image).decode()}
    headers = {"Prefer": "respond-async"}
    answers = [client.post("/v1/meshes", json=body, headers=headers) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 503]
    assert error_of(answers[2])["code"] == "overloaded"
    assert int(answers[2].headers["retry-after"]) >= 1
    assert client.post("/v1/images", json={"prompt": "a"}, headers=headers).status_code == 202


def test_mesh_is_answered_as_base64_glb_with_seed_and_receipt(make: Callable[..., Response]) -> None:
    answer = make().json()
    (entry,) = answer["data"]
    mesh = opened(base64.b64decode(entry["b64_json"]))
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(4.15, abs=0.05)
    assert (answer["model"], answer["output_format"], answer["octree_resolution"]) == ("ball", "glb", 32)
    assert entry["seed"] == 5
    assert answer["receipt"]["mesh"] == {
        "num_vertices": len(mesh.vertices),
        "num_faces": len(mesh.faces),
        "num_components": 1,
        "num_removed_floaters": 0,
        "is_watertight": True,
    }
    assert answer["receipt"]["num_inference_steps"] == 4


@pytest.mark.parametrize("mesh_format", list(MeshFormat))
def test_binary_answers_the_file_itself(make: Callable[..., Response], mesh_format: MeshFormat) -> None:
    response = make(output_format=mesh_format, response_format="binary")
    assert response.headers["content-type"] == mesh_format.content_type
    assert opened(response.content, mesh_format).volume == pytest.approx(4.15, abs=0.05)
    assert json.loads(response.headers["X-Receipt"])["mesh"]["is_watertight"]
    assert response.headers["X-Seed"] == "5"


def test_url_points_at_the_file(make: Callable[..., Response], client: TestClient) -> None:
    (entry,) = make(response_format="url", output_format="stl").json()["data"]
    response = client.get(entry["url"])
    assert response.headers["content-type"] == "model/stl"
    assert response.headers["content-disposition"].endswith('-0.stl"')
    assert len(opened(response.content, "stl").faces) == 1280


def test_a_job_that_is_done_has_taken_all_of_its_steps(make: Callable[..., Response], client: TestClient) -> None:
    job = client.get(f"/v1/jobs/{make().json()['id']}").json()
    # The schedule ends in a step of no length.
    assert job["progress"] == {"step": 3, "num_computed_steps": 3, "num_inference_steps": 4}


def test_faces_are_reduced_as_asked(make: Callable[..., Response]) -> None:
    assert make(target_faces=400).json()["receipt"]["mesh"]["num_faces"] <= 400


def test_form_is_another_way_to_write_the_body(client: TestClient, image: bytes) -> None:
    fields = {
        "seed": "9",
        "budget": '{"preset": "fast"}',
        "remove_background": "false",
        "output_format": "ply",
        "response_format": "binary",
        "model": "ball",
    }
    response = client.post("/v1/meshes", data=fields, files={"input_image": ("a.bin", image)})
    assert response.status_code == 200
    assert response.headers["X-Seed"] == "9"
    assert json.loads(response.headers["X-Receipt"])["compute_ratio"] == 0.5
    assert opened(response.content, "ply").is_watertight


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"input_image": None}, 422, "invalid_parameter", "input_image"),
        ({"input_image": 5}, 422, "invalid_parameter", "input_image"),
        ({"input_image": "@@"}, 400, "invalid_image", "input_image"),
        ({"input_image": "https://example.org/a.png"}, 400, "invalid_image", "input_image"),
        ({"octree_resolution": 17}, 422, "invalid_parameter", "octree_resolution"),
        ({"octree_resolution": 128}, 422, "invalid_parameter", "octree_resolution"),
        ({"target_faces": 1}, 422, "invalid_parameter", "target_faces"),
        ({"num_inference_steps": 51}, 422, "invalid_parameter", "num_inference_steps"),
        ({"remove_background": "maybe"}, 422, "invalid_parameter", "remove_background"),
        ({"remove_background": 1}, 422, "invalid_parameter", "remove_background"),
        ({"output_format": "png"}, 422, "invalid_parameter", "output_format"),
        ({"stream": 1}, 422, "invalid_parameter", "stream"),
        ({"prompt": "a"}, 422, "invalid_parameter", "prompt"),
        ({"model": "drawn"}, 422, "invalid_parameter", "model"),
        ({"model": "nothing"}, 404, "model_not_found", None),
    ],
)
def test_bad_fields_are_refused_by_name(
    make: Callable[..., Response], fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    response = make(**fields)
    assert response.status_code == status
    assert (error_of(response)["code"], error_of(response)["param"]) == (code, param)


def test_valid_resolutions_are_suggested(make: Callable[..., Response]) -> None:
    assert "try 16" in error_of(make(octree_resolution=17))["message"]
    assert "try 64" in error_of(make(octree_resolution=900))["message"]


def test_model_of_another_kind_is_refused_with_the_right_models(
    make: Callable[..., Response], client: TestClient
) -> None:
    assert "ball" in error_of(make(model="drawn"))["message"]
    response = client.post("/v1/images", json={"prompt": "a", "model": "ball"})
    assert response.status_code == 422
    assert "drawn, guided" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([("seed", (None, "1"))], "input_image"),
        ([("input_image", (None, "aGFsbG8="))], "input_image"),
        ([("input_image", ("a", b"x")), ("seed", (None, "1")), ("seed", (None, "2"))], "seed"),
        ([("seed", ("a", b"1"))], "seed"),
        ([("input_image", ("a", b"x")), ("budget", (None, "[" * 9000))], "budget"),
        ([("input_image", ("a", b"x")), ("seed", (None, "one"))], "seed"),
    ],
    ids=["no image", "image as text", "twice", "file for a number", "deep JSON", "no number"],
)
def test_bad_forms_are_refused_by_the_part(client: TestClient, parts: list[Any], param: str) -> None:
    response = client.post("/v1/meshes", files=parts)
    assert response.status_code == 422
    assert error_of(response)["param"] == param


def test_broken_forms_are_refused(client: TestClient, image: bytes) -> None:
    for content_type, body in [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=a", b"junk"),
        ("multipart/form-data; boundary=a", b'--a\r\nContent-Disposition: form-data; name="input_image"\r\n\r\n'),
        ("multipart/form-data; boundary=a", b""),
    ]:
        response = client.post("/v1/meshes", content=body, headers={"content-type": content_type})
        assert response.status_code == 422
        assert error_of(response)["code"] == "invalid_parameter"


def test_other_media_types_and_long_bodies_are_refused(client: TestClient, make: Callable[..., Response]) -> None:
    response = client.post("/v1/meshes", content=b"x", headers={"content-type": "image/png"})
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")
    response = make(input_image="A" * 300_000)
    assert (response.status_code, error_of(response)["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize("charset", ["punycode", "idna", "undefined", "latin-1", "x" * 900])
def test_forms_in_other_charsets_are_refused(client: TestClient, charset: str) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + b"a" * 9000 + b"-b..\r\n--b--\r\n"
    content_type = f"multipart/form-data; boundary=b; charset={charset}"
    response = client.post("/v1/meshes", content=form, headers={"Content-Type": content_type})
    assert response.status_code == 415
    assert "send it as UTF-8" in error_of(response)["message"]


def test_image_may_be_longer_than_the_limit_of_other_bodies(make: Callable[..., Response], image: bytes) -> None:
    encoded = base64.b64encode(image).decode()
    assert make(input_image=encoded + " \n" * 30_000).status_code == 200  # the limit is 20 000 bytes
    assert make(input_image=encoded, model="x" * 20_000).status_code == 413


@pytest.mark.parametrize(
    "texts",
    [[("model", "x" * 20_001)], [("model", "x" * 10_001), ("seed", "1" * 10_001)], [(f"a{i}", "1") for i in range(33)]],
    ids=["one long text", "several texts", "many texts"],
)
def test_texts_of_a_form_are_limited(client: TestClient, image: bytes, texts: list[tuple[str, str]]) -> None:
    parts: Any = [("input_image", ("a", image)), *((name, (None, text)) for name, text in texts)]
    response = client.post("/v1/meshes", files=parts)
    assert response.status_code in (413, 422)
    assert len(response.text) < 400


def test_empty_surface_fails_with_its_reason(make: Callable[..., Response]) -> None:
    response = make(seed=666)
    assert response.status_code == 500
    assert error_of(response)["code"] == "generation_failed"
    assert "never crosses" in error_of(response)["message"]
    assert make().status_code == 200


def test_hostile_images_are_answered_4xx_with_their_field_or_a_mesh(
    client: TestClient, hostile_images: dict[str, bytes]
) -> None:
    statuses = []
    for name, data in hostile_images.items():
        response = client.post("/v1/meshes", files={"input_image": ("a", data)}, data={"response_format": "binary"})
        statuses.append(response.status_code)
        if response.status_code == 200:
            assert opened(response.content).is_watertight, name
        elif response.status_code == 413:
            assert error_of(response)["code"] == "payload_too_large", name
        else:
            assert response.status_code in (400, 422), (name, response.text)
            assert error_of(response)["param"] == "input_image", name
    assert len(statuses) > 200
    assert 20 < statuses.count(200) < len(statuses)


@pytest.fixture
def decoding_is_held(engine: Any) -> Iterator[None]:
    engine.decoding_gate.clear()
    yield
    engine.decoding_gate.set()


def test_a_mesh_is_decoded_while_others_take_steps(
    engine: Any, client: TestClient, make: Callable[..., Response], decoding_is_held: None
) -> None:
    """And while a image of another model is made from beginning to end but for its own decoding."""
    answers: list[Response] = []
    first = Thread(target=lambda: answers.append(make(seed=1)))
    first.start()
    _wait_until(lambda: len(engine.batches) == 3)
    second = Thread(target=lambda: answers.append(make(seed=2)))
    second.start()
    _wait_until(lambda: len(engine.batches) == 6)
    assert not answers
    engine.decoding_gate.set()
    first.join()
    second.join()
    assert [answer.status_code for answer in answers] == [200, 200]


def _wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_background_removal_is_passed_on(make: Callable[..., Response], engine: Any, monkeypatch: Any) -> None:
    seen: list[Any] = []
    start = engine.start

    def note_and_start(request: Any, encoded: Any) -> Any:
        seen.append(request)
        return start(request, encoded=encoded)

    monkeypatch.setattr(engine, "start", note_and_start)
    for value in ("auto", True, False, None):
        assert make(remove_background=value).status_code == 200
    assert [request.remove_background for request in seen] == ["auto", "always", "never", "auto"]
    image = Image.open(BytesIO(seen[0].input_image))
    assert np.array_equal(np.unique(np.asarray(image)), [10, 20, 200])
