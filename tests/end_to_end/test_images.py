"""Images over HTTP, from a trained model in a server process."""

import base64
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.card import ImageCard
from models.file_formats import read_metadata
from models.zoo import load_engine
from service.api.parsing import parse_image_body
from service.api.schemas import ImageBody
from service.budget import BudgetBody
from tests.fixtures.forked_server import ForkedElasticDit
from tests.fixtures.waiting import wait_until

StartServer = Callable[..., ForkedElasticDit]

ROOT = Path(__file__).parents[2]
PROMPT: dict[str, Any] = {"prompt": "a red circle above a blue square", "seed": 7}
TIMEOUT_S = 300
FLUX_ALONE = {"ELASTIC_MODELS": "checkpoints/tiny-flux"}


def post(server: str, **fields: Any) -> httpx2.Response:
    return httpx2.post(f"{server}/v1/images", json={**PROMPT, **fields}, timeout=TIMEOUT_S)


def pixels_of(data: bytes) -> NDArray[np.uint8]:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def test_unchanged_openai_client_makes_an_image(server: str) -> None:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        model = client.models.list().data[0].id
        answer = client.images.generate(model=model, prompt=PROMPT["prompt"], n=1, size="auto", quality="low")
    assert answer.data is not None
    assert answer.data[0].b64_json is not None
    pixels = pixels_of(base64.b64decode(answer.data[0].b64_json))
    assert f"{pixels.shape[1]}x{pixels.shape[0]}" == answer.size
    assert pixels.std() > 0


@pytest.mark.parametrize("background", ["plain light", "busy dark"])
@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_transparent_image_shows_its_object_alone(server: str, background: str, output_format: str) -> None:
    prompt = f"a large red circle in the centre, on a {background} background"
    fields = {"prompt": prompt, "background": "transparent", "output_format": output_format}
    answer = post(server, **fields).json()
    assert answer["background"] == "transparent"
    with Image.open(BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as image:
        assert image.mode == "RGBA"
        pixels = np.asarray(image)
    alpha = pixels[..., 3] / 255
    assert 0.1 < alpha.mean() < 0.6
    assert alpha[64, 64] == 1
    assert not alpha[:4].any()
    red, green, blue = (pixels[..., :3] * alpha[..., None]).sum((0, 1))[:3]
    assert red > 2 * max(green, blue)


def test_every_response_format_has_the_same_image(server: str) -> None:
    in_json = base64.b64decode(post(server).json()["data"][0]["b64_json"])
    behind_url = httpx2.get(post(server, response_format="url").json()["data"][0]["url"]).content
    itself = post(server, response_format="binary")
    np.testing.assert_array_equal(pixels_of(behind_url), pixels_of(in_json))
    np.testing.assert_array_equal(pixels_of(itself.content), pixels_of(in_json))
    assert json.loads(itself.headers["x-receipt"])["compute_ratio"] <= 1


@pytest.mark.parametrize("output_format", ["png", "webp", "jpeg"])
def test_every_output_format_can_be_opened(output_format: str, server: str) -> None:
    response = post(server, response_format="binary", output_format=output_format)
    assert response.headers["content-type"] == f"image/{output_format}"
    with Image.open(BytesIO(response.content)) as image:
        assert image.format == output_format.upper()
    if output_format != "jpeg":
        assert read_metadata(response.content)["prompt"] == PROMPT["prompt"]


@pytest.mark.parametrize("preset", ["exact", "high", "balanced", "fast", "draft"])
def test_receipt_tells_what_a_preset_cost(preset: str, server: str) -> None:
    receipt = post(server, budget={"preset": preset}, trace=True).json()["receipt"]
    model = httpx2.get(f"{server}/v1/models").json()["data"][0]
    (point,) = [point for point in model["curve"] if point["preset"] == preset]
    assert receipt["quality_requested"] == point["quality"]
    assert receipt["compute_ratio_predicted"] == pytest.approx(point["compute_ratio"])
    if preset == "exact":
        assert receipt["compute_ratio"] == pytest.approx(1)
    else:
        assert receipt["compute_ratio"] < 1
    decisions = [entry["decision"] for step in receipt["decisions"] for entry in step]
    blocks = receipt["blocks"]
    assert len(receipt["decisions"]) == receipt["num_inference_steps"]
    assert [decisions.count(decision) for decision in ("run", "skip", "reuse", "forecast")] == [
        blocks["run"],
        blocks["skipped"],
        blocks["reused"],
        blocks["forecast"],
    ]
    num_computed = point["steps"]["computed"] if point["steps"] else receipt["num_inference_steps"]
    assert receipt["steps"] == {"computed": num_computed, "forecast": receipt["num_inference_steps"] - num_computed}
    assert receipt["calibrated"]


def test_compute_ratio_is_a_cap(server: str) -> None:
    receipt = post(server, budget={"compute_ratio": 0.7}).json()["receipt"]
    assert 0 < receipt["compute_ratio"] <= 0.7 + 1e-6
    assert receipt["quality_requested"] is None


def test_true_guidance_changes_the_image(server: str) -> None:
    plain = post(server, response_format="binary")
    guided = post(server, response_format="binary", negative_prompt="a blue square", true_cfg_scale=3)
    assert guided.status_code == 200
    assert not np.array_equal(pixels_of(plain.content), pixels_of(guided.content))


def test_requests_that_come_together_share_steps(server: str) -> None:
    with ThreadPoolExecutor(4) as clients:
        futures = [clients.submit(post, server, seed=seed, num_inference_steps=20) for seed in range(4)]
        receipts = [future.result().json()["receipt"] for future in futures]
    assert max(receipt["batch_size_mean"] for receipt in receipts) > 1
    page = httpx2.get(f"{server}/metrics").text
    assert 'elastic_block_decisions_total{block="double.00",decision="run",model="tiny-flux"}' in page


def test_image_is_the_one_made_alone_whatever_came_before_and_after_it(server: str) -> None:
    # Given requests of all kinds of budgets, steps and guidance, each of which arrives while others run
    various: list[dict[str, Any]] = [
        {"budget": {"preset": "exact"}},
        {"budget": {"preset": "draft"}},
        {"budget": {"quality": 0.99}, "negative_prompt": "a blue square", "true_cfg_scale": 2},
        {"budget": {"compute_ratio": 0.35}, "num_inference_steps": 30},
        {"budget": {"compute_ratio": 0.06}},
        {"budget": {"preset": "balanced"}, "num_inference_steps": 9, "prompt": "a ring"},
    ]
    common = {**PROMPT, "model": "tiny-flux", "trace": True}
    bodies = [{**common, "seed": seed, **fields} for seed, fields in enumerate(various)]
    # When the server makes them
    with ThreadPoolExecutor(len(bodies)) as clients:
        futures = []
        for body in bodies:
            before = computed_steps(server)
            futures.append(clients.submit(httpx2.post, f"{server}/v1/images", json=body, timeout=TIMEOUT_S))
            while computed_steps(server) == before:
                time.sleep(0.01)
        answers = [future.result().json() for future in futures]
    # Then they shared steps, and each has the decisions and the image that the engine alone gives
    assert max(answer["receipt"]["batch_size_mean"] for answer in answers) > 1
    engine = load_engine([ROOT / "checkpoints/tiny-flux"], device="cpu", router_weights=ROOT / "router_weights")
    card = engine.cards["tiny-flux"]
    assert isinstance(card, ImageCard)
    for body, answer in zip(bodies, answers, strict=True):
        order = parse_image_body(ImageBody(**body), card, default_budget=BudgetBody(quality=0.9), random_seed=0)
        state = engine.start(order.requests[0])
        while not state.is_done:
            engine.step([state])
        summary = state.summary()
        assert answer["receipt"]["steps"] == {
            "computed": summary.num_steps_computed,
            "forecast": summary.num_steps_forecast,
        }
        decisions = [(entry["block"], entry["decision"]) for step in answer["receipt"]["decisions"] for entry in step]
        assert decisions == [(entry.block, entry.decision) for entry in summary.decisions or ()]
        pixels = pixels_of(base64.b64decode(answer["data"][0]["b64_json"])).astype(int)
        assert np.abs(pixels - np.asarray(engine.finish(state), int)).max() <= 1
    computed = [answer["receipt"]["steps"]["computed"] for answer in answers]
    assert computed[0] == 20
    assert computed[4] == 1


def computed_steps(server: str) -> float:
    page = httpx2.get(f"{server}/metrics", timeout=TIMEOUT_S).text
    return sum(map(float, re.findall(r'^elastic_steps_total\{decision="computed".*\} (\S+)$', page, re.MULTILINE)))


def test_every_refusal_has_the_error_schema(server: str) -> None:
    answers = {
        422: post(server, size="1000x10"),
        404: httpx2.get(f"{server}/v1/jobs/nothing"),
        405: httpx2.delete(f"{server}/v1/images"),
        415: httpx2.post(f"{server}/v1/images", content=b"{}", headers={"Content-Type": "text/plain"}),
        400: httpx2.post(f"{server}/v1/images", content=b"{", headers={"Content-Type": "application/json"}),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_sigterm_finishes_the_request_that_is_running(own_server: StartServer) -> None:
    server = own_server(**FLUX_ALONE)
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(post, server.url, num_inference_steps=50, budget={"preset": "exact"})
        wait_until_running(server.url)
        assert server.stop() == 0
        assert answer.result().status_code == 200


def test_sigterm_answers_503_to_requests_that_outlast_the_grace_period(own_server: StartServer) -> None:
    server = own_server(**FLUX_ALONE, ELASTIC_GRACE_S="0")
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(post, server.url, num_inference_steps=100, n=8, budget={"preset": "exact"})
        wait_until_running(server.url)
        assert server.stop() == 0
        response = answer.result()
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "draining"
    assert response.headers["retry-after"]


def wait_until_running(server: str) -> None:
    """Return when the server has taken a denoise step."""
    series = 'elastic_step_latency_seconds_count{model="tiny-flux"}'
    wait_until(lambda: series in httpx2.get(f"{server}/metrics", timeout=TIMEOUT_S).text)
