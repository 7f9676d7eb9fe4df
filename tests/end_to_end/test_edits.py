"""Edits of pictures with the real OpenAI SDK, from trained models of both families, over both stores."""

import base64
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import redis
from numpy.typing import NDArray
from openai.types import ImagesResponse
from PIL import Image, ImageDraw

from benchmarks.processes import RedisServer
from tests.fixtures.forked_server import ForkedElasticDit

FLUX, QWEN = "tiny-flux", "tiny-qwen-image"
PROMPT = "a large green triangle above a small blue square"
TIMEOUT_S = 300


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def scene() -> Image.Image:
    image = Image.new("RGB", (128, 128), (205, 205, 185))
    draw = ImageDraw.Draw(image)
    draw.ellipse((12, 8, 56, 52), "red")
    draw.rectangle((20, 80, 44, 104), "blue")
    return image


def upper_half() -> Image.Image:
    """OpenAI's kind of mask for the scene."""
    mask = Image.new("RGBA", (128, 128), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 128, 64))
    return mask


def pixels_of(entry: Any) -> NDArray[np.int16]:
    with Image.open(BytesIO(base64.b64decode(entry.b64_json))) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


SCENE = np.asarray(scene(), dtype=np.int16)


@pytest.fixture
def client(server: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=TIMEOUT_S) as client:
        yield client


def edited(client: openai.OpenAI, model: str, **fields: Any) -> ImagesResponse:
    seed = {"seed": 5, **fields.pop("extra_body", {})}
    answer: ImagesResponse = client.images.edit(
        model=model, image=png(scene()), prompt=PROMPT, extra_body=seed, **fields
    )
    return answer


def is_green(pixels: NDArray[np.int16]) -> bool:
    """Whether the upper half has more green than red things."""
    red, green, blue = (pixels[:64, :, channel] for channel in range(3))
    return int(((green > red + 40) & (green > blue + 40)).sum()) > 100 > int((red > green + 90).sum())


@pytest.mark.parametrize("model", [FLUX, QWEN])
@pytest.mark.parametrize(
    "budget",
    [{"quality": "low"}, {"quality": "max"}, {"extra_body": {"budget": {"compute_ratio": 0.3}}}],
    ids=["draft", "exact", "a third"],
)
def test_masked_part_follows_the_prompt_and_the_rest_stays(
    model: str, budget: dict[str, Any], client: openai.OpenAI
) -> None:
    answer = edited(client, model, mask=png(upper_half()), **budget)
    assert answer.data is not None
    pixels = pixels_of(answer.data[0])
    np.testing.assert_array_equal(pixels[64:], SCENE[64:])
    assert is_green(pixels)
    assert answer.usage is not None
    assert answer.usage.input_tokens_details.image_tokens == answer.usage.output_tokens > 0


@pytest.mark.parametrize("model", [FLUX, QWEN])
def test_strength_says_how_far_the_result_is_from_the_picture(model: str, client: openai.OpenAI) -> None:
    answers = [
        edited(client, model, quality="medium", extra_body={"strength": strength}) for strength in (0.2, 0.5, 1.0)
    ]
    distances = [float(np.abs(pixels_of(answer.data[0]) - SCENE).mean()) for answer in answers if answer.data]
    assert distances == sorted(distances)
    assert distances[0] < 0.5 * distances[2]
    receipts = [answer.model_extra["receipt"] for answer in answers if answer.model_extra]
    taken = [receipt["steps"]["computed"] + receipt["steps"]["forecast"] for receipt in receipts]
    assert taken == [round(strength * receipts[0]["num_inference_steps"]) for strength in (0.2, 0.5, 1.0)]


def test_several_images_have_a_seed_each_and_share_the_picture(client: openai.OpenAI) -> None:
    answer = edited(client, FLUX, n=2, size="auto", output_format="webp", quality="low", input_fidelity="high")
    assert answer.data is not None
    assert answer.size == "128x128"
    first, second = map(pixels_of, answer.data)
    assert np.abs(first - second).max() > 20
    alone = edited(client, FLUX, extra_body={"seed": 6}, output_format="webp", quality="low")
    assert alone.data is not None
    assert np.abs(pixels_of(alone.data[0]) - second).mean() < 1


def test_stream_has_previews_and_ends_in_the_edit(client: openai.OpenAI) -> None:
    with client.images.edit(
        model=FLUX, image=[png(scene())], prompt=PROMPT, stream=True, partial_images=2, quality="low"
    ) as stream:
        events: list[Any] = [event for event in stream if event.type.startswith("image_edit")]
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert pixels_of(events[-1]).shape == (128, 128, 3)
    assert events[-1].usage.total_tokens > 0


def test_refusals_reach_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="nothing may change"):
        edited(client, FLUX, mask=png(Image.new("RGBA", (128, 128), "black")))
    with pytest.raises(openai.BadRequestError, match="image is not a readable image"):
        client.images.edit(model=FLUX, image=b"no image", prompt=PROMPT)


@pytest.fixture
def on_redis(redis_server: RedisServer, own_server: Callable[..., ForkedElasticDit]) -> str:
    """The address of a server with both families whose jobs are in Redis."""
    return own_server(ELASTIC_REDIS_URL=redis_server.url, ELASTIC_MODELS=f"{FLUX},{QWEN}").url


@pytest.mark.redis
@pytest.mark.long
def test_edits_over_redis_are_those_over_memory_and_leave_no_pictures_behind(
    server: str, on_redis: str, redis_server: RedisServer
) -> None:
    for model in (FLUX, QWEN):
        fields = {"model": model, "prompt": PROMPT, "seed": 5, "n": 2, "num_inference_steps": 8, "size": "128x128"}
        pictures = {"image": text_of(scene()), "mask": text_of(upper_half())}
        answers = [
            httpx2.post(f"{url}/v1/images/edits", json={**fields, **pictures}, timeout=TIMEOUT_S).json()
            for url in (server, on_redis)
        ]
        for here, there in zip(answers[0]["data"], answers[1]["data"], strict=True):
            files = (base64.b64decode(entry["b64_json"]) for entry in (here, there))
            expected, made = (np.asarray(Image.open(BytesIO(file)), dtype=np.int16) for file in files)
            assert np.abs(made - expected).max() <= 1
            np.testing.assert_array_equal(made[64:], SCENE[64:])
    with redis.Redis.from_url(redis_server.url) as store:
        assert list(store.scan_iter("*:picture")) == []


def text_of(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode()
