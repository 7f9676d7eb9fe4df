"""Two families in one process, with true guidance and negative prompts where the model has them."""

import base64
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline
from numpy.typing import NDArray
from PIL import Image

from training.scenes.judge import SHIPPED_JUDGE, load_judge

ROOT = Path(__file__).parents[2]
FLUX, QWEN = "tiny-flux", "tiny-qwen-image"
PROMPT = "A picture of a large red ring in the centre."
TIMEOUT_S = 300


def post(server: str, **fields: Any) -> httpx2.Response:
    return httpx2.post(f"{server}/v1/images", json={"prompt": PROMPT, "seed": 7, **fields}, timeout=TIMEOUT_S)


def images_of(response: httpx2.Response) -> list[NDArray[np.uint8]]:
    assert response.status_code == 200, response.text
    files = [BytesIO(base64.b64decode(entry["b64_json"])) for entry in response.json()["data"]]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def test_both_families_are_listed_with_their_guidance(server: str) -> None:
    models = httpx2.get(f"{server}/v1/models").json()["data"]
    assert [(m["id"], m["family"], m["guidance"]) for m in models] == [
        (FLUX, "flux", "distilled"),
        (QWEN, "qwen_image", "true"),
        ("tiny-hunyuan3d", "hunyuan3d", "true"),
    ]


def test_each_request_is_generated_by_the_model_it_names(server: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        bodies = [{"model": model, "budget": {"preset": "fast"}} for model in (FLUX, QWEN, FLUX, QWEN)]
        answers = list(pool.map(lambda body: post(server, **body), bodies))
    assert [answer.json()["model"] for answer in answers] == [FLUX, QWEN, FLUX, QWEN]
    flux, qwen, flux_again, qwen_again = (images_of(answer)[0] for answer in answers)
    # A shared batch changes an image by rounding at most.
    assert np.abs(flux.astype(int) - flux_again).max() <= 1
    assert np.abs(qwen.astype(int) - qwen_again).max() <= 1
    assert np.abs(flux.astype(int) - qwen).max() > 50


def test_exact_is_the_stock_pipelines_image(server: str) -> None:
    pipeline = QwenImagePipeline.from_pretrained(ROOT / "checkpoints" / QWEN, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    fields = {"guidance_scale": 3.0, "negative_prompt": "striped background", "num_inference_steps": 8}
    (ours,) = images_of(post(server, model=QWEN, budget={"preset": "exact"}, **fields))
    stock = pipeline(
        prompt=PROMPT,
        negative_prompt=fields["negative_prompt"],
        true_cfg_scale=fields["guidance_scale"],
        num_inference_steps=fields["num_inference_steps"],
        height=128,
        width=128,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert np.abs(ours.astype(int) - np.asarray(stock)).max() <= 1


@pytest.mark.parametrize(
    "budget",
    [pytest.param({"preset": "exact"}, marks=pytest.mark.long), {"preset": "fast"}],
    ids=["exact", "fast"],
)
def test_negative_prompt_keeps_its_subject_out_of_the_image(server: str, budget: dict[str, str]) -> None:
    """The prompt leaves the background open; the trained judge reads it."""
    judge = load_judge(SHIPPED_JUDGE)

    def backgrounds(negative_prompt: str | None) -> Counter[str]:
        answer = post(server, model=QWEN, n=8, num_inference_steps=10, budget=budget, negative_prompt=negative_prompt)
        images = torch.from_numpy(np.stack(images_of(answer))).permute(0, 3, 1, 2) / 127.5 - 1
        return Counter(f"{reading.texture} {reading.tone}" for reading in judge.read(images))

    background, count = backgrounds(None).most_common(1)[0]
    assert count > backgrounds(f"a {background} background")[background] == 0


def test_flux_takes_a_negative_prompt_with_true_guidance(server: str) -> None:
    body = {"model": FLUX, "budget": {"preset": "fast"}}
    guided = images_of(post(server, **body, negative_prompt="a red ring", true_cfg_scale=3.0))[0]
    assert np.abs(guided.astype(int) - images_of(post(server, **body))[0]).max() > 20


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": FLUX, "negative_prompt": "red"}, "negative_prompt"),
        ({"model": FLUX, "true_cfg_scale": 2.0}, "negative_prompt"),
        ({"model": QWEN, "negative_prompt": "red", "guidance_scale": 1.0}, "negative_prompt"),
        ({"model": QWEN, "true_cfg_scale": 2.0}, "true_cfg_scale"),
    ],
)
def test_impossible_guidance_is_refused_with_the_reason(server: str, fields: dict[str, Any], param: str) -> None:
    response = post(server, **fields)
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["param"] == param
    assert "guidance" in error["message"] or "true_cfg_scale" in error["message"]
