"""Edits over HTTP by models that read pictures beside the noise, in this process: their weights are random and tiny."""

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from models.zoo import load_engine
from service.app import build_dispatcher, create_app
from service.settings import Settings
from tests.fixtures.engines import write_manifest
from tests.fixtures.tiny_editing import small_pictures, tiny_flux_kontext, tiny_qwen_image_edit_plus

__all__ = ["small_pictures", "tiny_flux_kontext", "tiny_qwen_image_edit_plus"]

PROMPT = "red"
DEFAULTS = {"height": 64, "width": 64, "num_inference_steps": 28, "guidance_scale": 2.5}
BOTH = pytest.mark.parametrize(("model", "most"), [("tiny-flux-kontext", 1), ("tiny-qwen-image-edit-plus", 3)])


@pytest.fixture(scope="module")
def client(tiny_flux_kontext: Path, tiny_qwen_image_edit_plus: Path, tmp_path_factory: Any) -> Iterator[TestClient]:
    settings = Settings(models=(tiny_flux_kontext, tiny_qwen_image_edit_plus), grace_s=0)
    no_routers = tmp_path_factory.mktemp("no routers")
    for directory in settings.models:
        write_manifest(no_routers / directory.name, DEFAULTS)
    dispatcher = build_dispatcher(
        settings, lambda: load_engine(settings.models, device="cpu", router_weights=no_routers)
    )
    dispatcher.worker.start()
    with TestClient(create_app(settings, dispatcher)) as client:
        yield client


def text_of(colour: str, size: tuple[int, int] = (96, 48)) -> str:
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def pixels_of(answer: dict[str, Any]) -> Any:
    return np.asarray(Image.open(BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))), dtype=int)


@BOTH
def test_every_picture_counts(client: TestClient, model: str, most: int) -> None:
    def edit(*colours: str) -> dict[str, Any]:
        body = {
            "model": model,
            "prompt": PROMPT,
            "image": [text_of(colour) for colour in colours],
            "seed": 1,
            "num_inference_steps": 2,
        }
        response = client.post("/v1/images/edits", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    answers = [edit(*["navy"] * (number - 1), last) for number in range(1, most + 1) for last in ("navy", "white")]
    assert len({pixels_of(answer).tobytes() for answer in answers}) == len(answers)
    tokens = [answer["usage"]["input_tokens_details"]["image_tokens"] for answer in answers[::2]]
    assert tokens == [number * tokens[0] for number in range(1, most + 1)]
    (width, height) = map(int, answers[0]["size"].split("x"))
    assert width > height  # as the pictures


@BOTH
def test_what_such_models_do_not_take_is_refused(client: TestClient, model: str, most: int) -> None:
    body = {"model": model, "prompt": PROMPT, "image": text_of("navy")}
    for fields, param in (
        ({"strength": 0.5}, "strength"),
        ({"mask": text_of("white")}, "mask"),
        ({"image": [text_of("navy")] * (most + 1)}, "image"),
    ):
        response = client.post("/v1/images/edits", json={**body, **fields})
        assert (response.status_code, response.json()["error"]["param"]) == (422, param)
    entry = client.get(f"/v1/models/{model}").json()
    assert (entry["edits"], entry["max_input_images"]) == ("reference", most)
    alone = client.post("/v1/images", json={"model": model, "prompt": PROMPT, "num_inference_steps": 1})
    assert alone.status_code == (422 if entry["needs_input_image"] else 200)
