"""OpenAI's own SDK for Python."""

import base64
from collections.abc import Callable, Iterable
from io import BytesIO
from typing import Any

import openai
from PIL import Image

from tests.clients.python.checks import (
    PROMPT,
    check_only_left_half_changed,
    check_transparent,
    check_usage,
    error_of,
    image_behind,
    image_of,
    image_of_base64,
    run,
    target,
)

TARGET = target()
client: Any = openai.OpenAI(base_url=TARGET.base_url, api_key=TARGET.api_key, max_retries=0)
SMALL = {"prompt": PROMPT, "size": "64x64", "quality": "low"}


def generate(model: str = "gpt-image-1", **fields: Any) -> Any:
    return client.images.generate(model=model, **SMALL | fields)


def edit(**fields: Any) -> Any:
    return client.images.edit(**{"model": "gpt-image-1", "prompt": "a blue square", "quality": "low"} | fields)


def models() -> None:
    ids = [model.id for model in client.models.list()]
    assert "tiny-flux" in ids, f"the models are {ids}"
    assert client.models.retrieve("tiny-flux").id == "tiny-flux"


def names() -> None:
    for name in ("dall-e-2", "dall-e-3", "gpt-image-1", "gpt-image-1-mini", "gpt-image-1.5", "gpt-image-2.6"):
        assert generate(name).data, name
    client.images.generate(prompt=PROMPT, size="64x64")  # no model at all


def several() -> None:
    seeds = {item.seed for item in generate(n=2).data}
    assert len(seeds) == 2
    assert len(generate(n=10).data) == 10


def size() -> None:
    answer = generate(size="96x64")
    assert answer.size == "96x64"
    assert image_of_base64(answer.data[0].b64_json).size == (96, 64)
    assert image_of_base64(generate(size="auto").data[0].b64_json).size == (128, 128)


def quality() -> None:
    for word in ("low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"):
        exact = generate(quality=word).receipt["compute_ratio"] == 1
        assert exact == (word in ("xhigh", "max", "hd")), f"{word} is {'exact' if exact else 'not exact'}"


def b64_json() -> None:
    answer = generate(response_format="b64_json")
    assert image_of_base64(answer.data[0].b64_json).size == (64, 64)
    assert answer.created > 0


def url() -> None:
    for item in generate(response_format="url", n=2).data:
        assert image_behind(item.url).size == (64, 64)
    assert image_behind(generate("dall-e-2").data[0].url).format == "PNG"


def file_format() -> None:
    for name in ("png", "webp", "jpeg"):
        answer = generate(output_format=name)
        assert answer.output_format == name
        assert image_of_base64(answer.data[0].b64_json).format == name.upper()
    sizes = [
        len(
            base64.b64decode(
                generate(output_format="jpeg", output_compression=percent, extra_body={"seed": 1}).data[0].b64_json
            )
        )
        for percent in (10, 90)
    ]
    assert sizes[0] < sizes[1]


def own_fields() -> None:
    body = {"seed": 5, "budget": {"preset": "draft"}}
    pictures = [
        client.images.generate(model="tiny-flux", prompt=PROMPT, size="64x64", extra_body=body).data[0]
        for _ in range(2)
    ]
    assert pictures[0].seed == 5
    assert pictures[0].b64_json == pictures[1].b64_json


def ignored_fields() -> None:
    generate(style="vivid", user="user-1", moderation="low", background="opaque")
    generate(extra_body={"safety_identifier": "user-1", "complexity": "auto"})


def large_picture() -> bytes:
    """Some 3 MB of noise as a PNG file: more than what sockets and proxies hold."""
    file = BytesIO()
    Image.effect_noise((2000, 2000), 100).save(file, "PNG")
    return file.getvalue()


def check_stream(events: Iterable[Any], name: str) -> None:
    *before, last = [event for event in events if event.type.startswith(name)]
    assert [event.type for event in before] == [f"{name}.partial_image"] * 2, [event.type for event in before]
    assert [event.partial_image_index for event in before] == [0, 1]
    assert last.type == f"{name}.completed"
    assert image_of_base64(last.b64_json).size == (64, 64)
    for event in (*before, last):
        width, height = image_of_base64(event.b64_json).size  # a preview may be smaller
        assert width == height
        assert (event.size, event.quality, event.output_format) == ("64x64", "low", "png"), event.quality
        assert event.background == "opaque"
        assert event.created_at > 0
    check_usage(last.usage)


def stream() -> None:
    check_stream(generate(stream=True, partial_images=2), "image_generation")
    events = [event for event in generate(stream=True, n=2) if event.type == "image_generation.completed"]
    assert len({event.b64_json for event in events}) == 2


def usage() -> None:
    one, two = generate().usage, generate(n=2).usage
    check_usage(one)
    check_usage(two)
    assert one.input_tokens_details.text_tokens == one.input_tokens
    assert two.output_tokens == 2 * one.output_tokens


def edit_picture() -> None:
    answer = edit(image=TARGET.picture)
    assert image_of_base64(answer.data[0].b64_json).size == (128, 128)
    check_usage(answer.usage)
    answer = edit(image=[TARGET.picture.read_bytes()], n=2, size="64x64", input_fidelity="high")
    assert [image_of_base64(item.b64_json).size for item in answer.data] == [(64, 64)] * 2


def edit_with_mask() -> None:
    with TARGET.picture.open("rb") as picture, TARGET.mask.open("rb") as mask:
        answer = edit(image=picture, mask=mask)
    check_only_left_half_changed(image_of_base64(answer.data[0].b64_json), TARGET.picture)


def edit_stream() -> None:
    check_stream(edit(image=TARGET.picture, stream=True, partial_images=2, size="64x64"), "image_edit")


def transparent() -> None:
    for name in ("png", "webp"):
        answer = generate(background="transparent", output_format=name, size="128x128")
        assert answer.background == "transparent"
        check_transparent(image_of_base64(answer.data[0].b64_json))
    error = error_of(lambda: generate(background="transparent", output_format="jpeg"))
    assert isinstance(error, openai.UnprocessableEntityError), repr(error)


def errors() -> None:
    wrong = openai.OpenAI(base_url=TARGET.base_url, api_key="sk-wrong", max_retries=0)
    expected: list[tuple[type[openai.APIStatusError], str, Callable[[], object]]] = [
        (openai.AuthenticationError, "invalid_api_key", lambda: wrong.models.list()),
        (openai.AuthenticationError, "invalid_api_key", lambda: wrong.images.edit(image=large_picture(), prompt="a")),
        (openai.UnprocessableEntityError, "invalid_parameter", lambda: generate(size="65x64")),
        (openai.NotFoundError, "model_not_found", lambda: generate("no-such-model")),
        (openai.BadRequestError, "invalid_image", lambda: edit(image=b"no picture")),
    ]
    for kind, code, call in expected:
        error = error_of(call)
        assert isinstance(error, kind), f"{error!r} instead of {kind.__name__}"
        assert error.code == code, error.code
        assert error.request_id, "the answer has no x-request-id"


def raw_content() -> None:
    answer = client.images.with_raw_response.generate(
        model="gpt-image-1", **SMALL, extra_body={"response_format": "binary"}
    )
    assert image_of(answer.content).size == (64, 64)


run(
    {
        "models": models,
        "model names": names,
        "n": several,
        "size": size,
        "quality": quality,
        "b64_json": b64_json,
        "url": url,
        "format": file_format,
        "ignored fields": ignored_fields,
        "own fields": own_fields,
        "binary": raw_content,
        "stream": stream,
        "usage": usage,
        "edit": edit_picture,
        "mask": edit_with_mask,
        "edit stream": edit_stream,
        "transparent": transparent,
        "errors": errors,
    }
)
