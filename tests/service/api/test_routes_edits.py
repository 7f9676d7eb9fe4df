import base64
import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from PIL import Image

from models.card import ImageCard, PictureSizes
from models.request import ImageRequest
from service.settings import Settings

PATH = "/v1/images/edits"


def png(colour: Any = (200, 10, 20), size: tuple[int, int] = (96, 64)) -> bytes:
    file = BytesIO()
    Image.new("RGB" if len(colour) == 3 else "RGBA", size, colour).save(file, "PNG")
    return file.getvalue()


def mask_of(mode: str, kept: Any, changes: Any, size: tuple[int, int] = (96, 64)) -> bytes:
    """A mask whose left half changes."""
    image, file = Image.new(mode, size, kept), BytesIO()
    image.paste(changes, (0, 0, size[0] // 2, size[1]))
    image.save(file, "PNG")
    return file.getvalue()


def text_of(file: bytes) -> str:
    return base64.b64encode(file).decode()


def error_of(response: Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    return error


@pytest.fixture
def reader(engine: Any, drawn_card: ImageCard) -> ImageCard:
    """The card of a model that reads pictures beside the noise. The engine has loaded it."""
    card = replace(
        drawn_card,
        id="reader",
        max_input_images=3,
        needs_input_image=True,
        picture_sizes=PictureSizes(area=128 * 128),
    )
    engine.cards["reader"] = card
    return card


@pytest.fixture
def client(reader: ImageCard, start_client: Callable[..., TestClient], settings: Settings) -> TestClient:
    return start_client(settings)


@pytest.fixture
def started(engine: Any, monkeypatch: pytest.MonkeyPatch) -> list[ImageRequest]:
    """The requests that the engine has started."""
    requests: list[ImageRequest] = []
    start = engine.start

    def note_and_start(request: ImageRequest, encoded: Any) -> Any:
        requests.append(request)
        return start(request, encoded=encoded)

    monkeypatch.setattr(engine, "start", note_and_start)
    return requests


@pytest.fixture
def edit(client: TestClient) -> Callable[..., Response]:
    def edit(**fields: Any) -> Response:
        return client.post(PATH, json={"image": text_of(png()), "prompt": "a hat", "seed": 5, **fields})

    return edit


def pixels(file: bytes) -> Any:
    return np.asarray(Image.open(BytesIO(file)))


def test_answer_is_that_of_an_image(edit: Callable[..., Response], started: list[ImageRequest]) -> None:
    answer = edit(n=2).json()
    assert [entry["seed"] for entry in answer["data"]] == [5, 6]
    assert (answer["model"], answer["size"], answer["output_format"]) == ("drawn", "80x48", "png")
    assert pixels(base64.b64decode(answer["data"][0]["b64_json"])).shape == (48, 80, 3)
    (request, other) = sorted(started, key=lambda request: request.seed)
    assert request.edit is not None
    assert request.edit is other.edit
    assert request.edit.mask is None
    assert request.edit.strength == 0.8
    assert np.array_equal(pixels(request.edit.images[0]), pixels(png()))


@pytest.mark.parametrize(
    "picture",
    [
        {"image": text_of(png())},
        {"image": f"data:image/png;base64,{text_of(png())}"},
        {"image": [text_of(png())]},
        {"images": [{"image_url": f"data:image/png;base64,{text_of(png())}"}]},
        {"images": [text_of(png())]},
    ],
    ids=["text", "data URL", "list", "OpenAI's objects", "OpenAI's list"],
)
def test_json_has_pictures_in_every_form_that_clients_write(
    picture: dict[str, Any], client: TestClient, started: list[ImageRequest]
) -> None:
    mask = text_of(mask_of("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)))
    for given in ({}, {"mask": mask}, {"mask": {"image_url": f"data:image/png;base64,{mask}"}}):
        assert client.post(PATH, json={"prompt": "a", **picture, **given}).status_code == 200
    edits = [request.edit for request in started]
    assert [edit is not None and edit.mask is not None for edit in edits] == [False, True, True]
    assert edits[1] == edits[2]


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_form_is_another_way_to_write_the_body(name: str, client: TestClient, started: list[ImageRequest]) -> None:
    fields = {
        "prompt": "123",
        "seed": "9",
        "strength": "0.25",
        "budget[preset]": "fast",
        "output_format": "webp",
        "quality": "auto",
        "input_fidelity": "high",
        "response_format": "binary",
        "model": "drawn",
        "size": "64x32",
    }
    mask = mask_of("RGBA", (0, 0, 0, 255), (0, 0, 0, 0))
    data = {name: value for name, value in fields.items() if name != "quality"}
    response = client.post(PATH, data=data, files=[(name, ("a.png", png())), ("mask", ("m.png", mask))])
    assert response.status_code == 200, response.text
    assert (response.headers["X-Seed"], response.headers["content-type"]) == ("9", "image/webp")
    assert json.loads(response.headers["X-Receipt"])["compute_ratio"] == 0.5
    (request,) = started
    assert (request.prompt, request.width, request.height) == ("123", 64, 32)
    assert request.edit is not None
    assert request.edit.strength == 0.25
    assert request.edit.mask is not None
    refused = client.post(PATH, data=fields, files=[(name, ("a.png", png()))])
    assert "quality 'auto' and budget" in error_of(refused)["message"]


def test_form_and_json_of_one_key_are_one_job(client: TestClient) -> None:
    headers = {"Idempotency-Key": "once"}
    first = client.post(PATH, data={"prompt": "a", "seed": "1"}, files={"image": ("a", png())}, headers=headers)
    again = client.post(PATH, json={"prompt": "a", "seed": 1, "image": text_of(png())}, headers=headers)
    assert first.headers["X-Job-ID"] == again.headers["X-Job-ID"]
    other = client.post(PATH, json={"prompt": "a", "seed": 1, "image": text_of(png((1, 2, 3)))}, headers=headers)
    assert (other.status_code, error_of(other)["code"]) == (422, "idempotency_key_reused")


def test_several_pictures_reach_a_model_that_reads_several(client: TestClient, started: list[ImageRequest]) -> None:
    files = [("image[]", (f"{colour}.png", png((colour, 0, 0)))) for colour in (1, 2, 3)]
    assert client.post(PATH, data={"prompt": "a", "model": "reader"}, files=files).status_code == 200
    (request,) = started
    assert request.edit is not None
    assert [pixels(image)[0, 0, 0] for image in request.edit.images] == [1, 2, 3]
    assert request.edit.strength is None
    assert request.edit.sizes == ((96, 64),) * 3
    refused = client.post(PATH, data={"prompt": "a", "model": "drawn"}, files=files)
    assert error_of(refused)["message"] == "image has 3 pictures; drawn edits at most 1 picture at once"


MASKS = {
    "OpenAI's": mask_of("RGBA", (255, 255, 255, 255), (0, 0, 0, 0)),
    "diffusers'": mask_of("L", 0, 255),
    "one bit": mask_of("1", 0, 1),
    "grey": mask_of("L", 120, 140),
    "transparent white": mask_of("RGBA", (0, 0, 0, 200), (255, 255, 255, 100)),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask_shows_what_may_change_by_its_transparency(
    name: str, edit: Callable[..., Response], started: list[ImageRequest]
) -> None:
    assert edit(mask=text_of(MASKS[name])).status_code == 200
    (request,) = started
    assert request.edit is not None
    assert request.edit.strength == 1.0
    assert request.edit.mask is not None
    changes = pixels(request.edit.mask)[..., 3] < 128
    assert changes[:, :48].all()
    assert not changes[:, 48:].any()


@pytest.mark.parametrize(
    ("fields", "status", "param", "says"),
    [
        ({"image": None}, 422, "image", "image is required"),
        ({"image": []}, 422, "image", "at least 1 item"),
        ({"image": ["aa"] * 17}, 422, "image", "at most 16 items"),
        ({"image": 5}, 422, "image", "list"),
        ({"image": ["aa", 5]}, 422, "image[1]", "image[1] 5"),
        ({"image": [""]}, 422, "image[0]", "empty"),
        ({"images": [{"image_url": "aa"}]}, 422, "images", "give one of the two"),
        ({"image": None, "images": [{"file_id": "file-1"}]}, 422, "images[0]", "file-1"),
        ({"image": None, "images": [{"image_url": "https://example.org/a.png"}]}, 400, "images", "does not fetch"),
        ({"image": "http://127.0.0.1/a.png"}, 400, "image", "image is a URL, which this server does not fetch"),
        ({"image": "@@"}, 400, "image", "image is not base64"),
        ({"image": text_of(b"GIF89a")}, 400, "image", "image is not a readable image"),
        ({"model": "reader", "image": [text_of(png()), "aGFsbG8="]}, 400, "image[1]", "image[1] is not a readable"),
        ({"image": text_of(png(size=(4, 4)))}, 400, "image", "4x4 pixels"),
        ({"mask": "aGFsbG8="}, 400, "mask", "mask is not a readable image"),
        ({"mask": text_of(png((9, 9, 9, 0), (64, 64)))}, 422, "mask", "mask has 64x64 pixels and its picture 96x64"),
        ({"mask": text_of(png((0, 0, 0, 255)))}, 422, "mask", "mask is nowhere transparent, so nothing may change"),
        ({"mask": text_of(png((0, 0, 0)))}, 422, "mask", "mask is nowhere white, so nothing may change"),
        ({"mask": text_of(png((0, 0, 0, 0))), "model": "reader"}, 422, "mask", "reader may change all"),
        ({"strength": 0.5, "model": "reader"}, 422, "strength", "strength 0.5 cannot be used here"),
        ({"strength": 0}, 422, "strength", "strength 0 is not above 0"),
        ({"strength": 1e-20}, 422, "strength", "takes none of the 4 denoise steps"),
        ({"strength": 1.01}, 422, "strength", "strength 1.01 is above 1"),
        ({"strength": "0.5"}, 422, "strength", "strength '0.5'"),
        ({"input_fidelity": "medium"}, 422, "input_fidelity", "'medium'"),
        ({"prompt": ""}, 422, "prompt", "empty"),
        ({"size": "13x13"}, 422, "size", "try 32"),
        ({"strenght": 0.5}, 422, "strenght", "did you mean strength?"),
        ({"model": "ball"}, 422, "model", "makes no image"),
        ({"model": "nothing"}, 404, None, "no model 'nothing'"),
    ],
)
def test_bad_fields_are_refused_by_name(
    edit: Callable[..., Response], fields: dict[str, Any], status: int, param: str | None, says: str
) -> None:
    response = edit(**fields)
    assert (response.status_code, error_of(response)["param"]) == (status, param), response.text
    assert says in error_of(response)["message"]
    assert len(error_of(response)["message"]) < 250


@pytest.mark.parametrize(
    ("parts", "param", "says"),
    [
        ([("image", (None, "aGFsbG8="))], "image", "send it as a file"),
        ([("image[]", (None, "aGFsbG8="))], "image[]", "send it as a file"),
        ([("mask", ("m", b"a")), ("mask", ("m", b"b"))], "mask", "more than once"),
        ([("markup", ("m", b"a"))], "markup", "only image and mask can be"),
        ([("image", ("m", b"a"))] * 18, None, "Too many files"),
        ([("budget[preset]", (None, "fast")), ("budget[preset]", (None, "high"))], "budget[preset]", "more than once"),
        ([("budget", (None, "5")), ("budget[preset]", (None, "fast"))], "budget[preset]", "unknown field"),
    ],
)
def test_bad_forms_are_refused_by_the_part(client: TestClient, parts: list[Any], param: str | None, says: str) -> None:
    response = client.post(PATH, files=[("prompt", (None, "a")), *parts])
    assert (response.status_code, error_of(response)["param"]) == (422, param)
    assert says in error_of(response)["message"]


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ((64, 64), "64x64"),  # the model's default
        ((40, 50), "32x48"),  # the nearest multiples of 16
        ((1000, 1000), "64x64"),
        ((1000, 500), "96x48"),
        ((12, 12), "32x32"),  # the smallest
        ((2000, 20), "1024x32"),  # the longest
    ],
)
def test_size_auto_is_near_that_of_the_picture(
    given: tuple[int, int], made: str, edit: Callable[..., Response]
) -> None:
    for fields in ({}, {"size": "auto"}):
        assert edit(image=text_of(png(size=given)), **fields).json()["size"] == made


def test_size_auto_of_a_model_that_reads_pictures_is_its_own(edit: Callable[..., Response]) -> None:
    answer = edit(image=[text_of(png()), text_of(png(size=(400, 100)))], model="reader").json()
    assert answer["size"] == "256x64"


def test_stream_has_the_events_of_edits(client: TestClient) -> None:
    body = {"image": text_of(png()), "prompt": "a", "stream": True, "partial_images": 2}
    lines = client.post(PATH, json=body).text.splitlines()
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert names.count("image_edit.partial_image") == 2
    assert names[-1] == "image_edit.completed"
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [entry["type"] for entry in data] == names
    assert data[-1]["b64_json"] == data[-1]["data"][0]["b64_json"]


def test_job_can_be_followed_after_its_pictures_are_gone(client: TestClient) -> None:
    body = {"image": text_of(png()), "prompt": "a"}
    job = client.post(PATH, json=body, headers={"Prefer": "respond-async, wait=20"})
    events = client.get(f"/v1/jobs/{job.headers['X-Job-ID']}/events").text
    assert "image_edit.completed" in events
    content = client.get(f"/v1/jobs/{job.headers['X-Job-ID']}/content")
    assert content.headers["content-type"] == "image/png"


def test_pictures_that_wait_are_bounded(start_client: Callable[..., TestClient], engine: Any) -> None:
    client = start_client(Settings(max_input_image_bytes=600))
    engine.gate.clear()
    body, headers = {"image": text_of(png()), "prompt": "a", "n": 8}, {"Prefer": "respond-async"}
    answers = [client.post(PATH, json=body, headers=headers) for _ in range(4)]
    statuses = [answer.status_code for answer in answers]
    assert statuses[:2] == [202, 202]  # n images share one picture
    assert statuses[-1] == 503
    assert error_of(answers[-1])["code"] == "overloaded"


def test_file_field_that_was_not_filled_in_is_not_there(client: TestClient, started: list[ImageRequest]) -> None:
    """As a browser sends it. An empty file with a name is refused."""
    for name, status in (("", 200), ("mask.png", 422)):
        body = (
            b'--a\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
            b'--a\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%b\r\n'
            b'--a\r\nContent-Disposition: form-data; name="mask"; filename="%b"\r\n\r\n\r\n--a--\r\n'
        ) % (png(), name.encode())
        response = client.post(PATH, content=body, headers={"content-type": "multipart/form-data; boundary=a"})
        assert response.status_code == status
    assert [request.edit is not None and request.edit.mask for request in started] == [None]


@pytest.mark.parametrize("missing", [b"--a--\r\n", b"--\r\n", b"0" * 20 + b"\r\n--a--\r\n"])
def test_form_that_is_cut_off_is_refused_whole(client: TestClient, missing: bytes) -> None:
    """It might have had a mask."""
    parts = [
        b'name="prompt"\r\n\r\na',
        b'name="image"; filename="a"\r\n\r\n' + png(),
        b'name="mask"; filename="a"\r\n\r\n' + b"0" * 40,
    ]
    body = b"".join(b"--a\r\nContent-Disposition: form-data; %b\r\n" % part for part in parts) + b"--a--\r\n"
    headers = {"content-type": "multipart/form-data; boundary=a"}
    response = client.post(PATH, content=body.removesuffix(missing), headers=headers)
    assert len(body.removesuffix(missing)) < len(body)
    assert response.status_code == 422
    assert error_of(response)["message"] == "the form can't be read: It ends before its last boundary."


def test_image_of_a_model_that_needs_a_picture_is_sent_to_the_edits(client: TestClient) -> None:
    response = client.post("/v1/images", json={"prompt": "a", "model": "reader"})
    assert (response.status_code, error_of(response)["param"]) == (422, "model")
    assert "/v1/images/edits" in error_of(response)["message"]


def test_default_model_of_images_is_one_that_needs_no_picture(
    engine: Any, reader: ImageCard, start_client: Callable[..., TestClient], settings: Settings
) -> None:
    engine.cards = {"reader": reader, **engine.cards}
    client = start_client(settings)
    assert client.post("/v1/images", json={"prompt": "a"}).json()["model"] == "drawn"
    assert client.post(PATH, json={"prompt": "a", "image": text_of(png())}).json()["model"] == "reader"


def test_models_say_how_they_edit(client: TestClient) -> None:
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    keys = ("edits", "max_input_images", "needs_input_image")
    assert [models["drawn"][key] for key in keys] == ["noised", 1, False]
    assert [models["reader"][key] for key in keys] == ["reference", 3, True]
    assert not set(keys) & models["ball"].keys()
    assert "strength" not in models["reader"]["defaults"]


def test_pictures_may_be_longer_than_the_limit_of_other_fields(edit: Callable[..., Response]) -> None:
    padded = text_of(png()) + " \n" * 20_000  # the limit is 20 000 bytes
    assert edit(image=[padded], mask=text_of(MASKS["grey"]) + " " * 20_000).status_code == 200
    assert edit(image=None, images=[padded]).status_code == 200
    response = edit(image=padded, user="x" * 20_000)
    assert (response.status_code, error_of(response)["code"]) == (413, "payload_too_large")
    assert "without image, images, image_url, mask" in error_of(response)["message"]


def test_other_media_types_and_long_bodies_are_refused(client: TestClient, edit: Callable[..., Response]) -> None:
    response = client.post(PATH, content=b"x", headers={"content-type": "image/png"})
    assert (response.status_code, error_of(response)["code"]) == (415, "unsupported_media_type")
    response = edit(image="A" * 300_000)
    assert (response.status_code, error_of(response)["code"]) == (413, "payload_too_large")


@pytest.mark.parametrize("field", ["image", "mask"])
def test_hostile_images_are_answered_4xx_with_their_field_or_an_image(
    field: str, client: TestClient, hostile_images: dict[str, bytes]
) -> None:
    statuses = []
    crafted = {name: data for name, data in hostile_images.items() if not name.startswith("mutation")}
    for name, data in crafted.items():
        files = {"image": ("a", png()), field: ("a", data)}
        body = {"response_format": "binary", "prompt": "a", "num_inference_steps": "1"}
        response = client.post(PATH, files=files, data=body)
        statuses.append(response.status_code)
        if response.status_code == 200:
            assert response.headers["content-type"] == "image/png", name
        elif response.status_code == 413:
            assert error_of(response)["code"] == "payload_too_large", name
        else:
            assert response.status_code in (400, 422), (name, response.text)
            assert error_of(response)["param"] == field, name
    assert len(statuses) > 30
    assert (statuses.count(200) > 10) == (field == "image")  # as a mask, all have another size
