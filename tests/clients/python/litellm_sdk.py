"""LiteLLM as a library: the provider `openai` with another address."""

import os
from functools import partial
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read at import; else it is fetched

import litellm

from tests.clients.python.checks import (
    PROMPT,
    check_only_left_half_changed,
    check_transparent,
    check_usage,
    error_of,
    image_behind,
    image_of_base64,
    run,
    target,
)

litellm.suppress_debug_info = True  # it would print advice to stdout
TARGET = target()
SERVER = {"api_base": TARGET.base_url, "api_key": TARGET.api_key, "max_retries": 0}
SMALL = {"prompt": PROMPT, "size": "64x64", "quality": "low"}


def generate(model: str = "openai/gpt-image-1", **fields: Any) -> Any:
    return litellm.image_generation(model=model, **SERVER | SMALL | fields)


def edit(**fields: Any) -> Any:
    wanted = {"model": "openai/gpt-image-1", "prompt": "a blue square", "image": TARGET.picture.read_bytes()}
    return litellm.image_edit(**SERVER | wanted | fields)


def names() -> None:
    for name in ("openai/gpt-image-1", "openai/dall-e-2", "openai/dall-e-3", "openai/tiny-flux"):
        assert generate(name).data, name


def several() -> None:
    assert len(generate(n=2).data) == 2
    assert len(generate(n=10).data) == 10


def size() -> None:
    assert image_of_base64(generate(size="96x64").data[0].b64_json).size == (96, 64)


def quality() -> None:
    for word in ("low", "medium", "high", "auto"):
        assert generate(quality=word).data, word


def b64_json() -> None:
    assert image_of_base64(generate().data[0].b64_json).size == (64, 64)


def url() -> None:
    answer = generate(extra_body={"response_format": "url"})  # it knows no response_format for this provider
    assert image_behind(answer.data[0].url).size == (64, 64)


def file_format() -> None:
    answer = generate(output_format="webp", output_compression=50)
    assert image_of_base64(answer.data[0].b64_json).format == "WEBP"


def ignored_fields() -> None:
    assert generate(user="user-1", moderation="low", background="auto", extra_body={"style": "vivid"}).data


def own_fields() -> None:
    pictures = [generate("openai/tiny-flux", extra_body={"seed": 5}).data[0].b64_json for _ in range(2)]
    assert pictures[0] == pictures[1]


def usage() -> None:
    check_usage(generate().usage)


def edit_picture() -> None:
    answer = edit()
    assert image_of_base64(answer.data[0].b64_json).size == (128, 128)
    answer = edit(image=[TARGET.picture.read_bytes()], n=2, size="64x64", input_fidelity="high")
    assert [image_of_base64(item.b64_json).size for item in answer.data] == [(64, 64)] * 2


def edit_with_mask() -> None:
    answer = edit(mask=TARGET.mask.read_bytes())
    check_only_left_half_changed(image_of_base64(answer.data[0].b64_json), TARGET.picture)


def transparent() -> None:
    answer = generate(background="transparent", output_format="png", size="128x128")
    check_transparent(image_of_base64(answer.data[0].b64_json))


def errors() -> None:
    expected: list[tuple[type[Exception], str, dict[str, str]]] = [
        (litellm.AuthenticationError, "API key", {"api_key": "sk-wrong"}),
        (litellm.BadRequestError, "width 65 is not a multiple of 16; try 64", {"size": "65x64"}),  # its word for 422
        (litellm.NotFoundError, "there is no model 'no-such-model'", {"model": "openai/no-such-model"}),
    ]
    for kind, message, fields in expected:
        error = error_of(partial(generate, **fields))
        assert type(error) is kind, f"{error!r} instead of {kind.__name__}"
        assert message in str(error), str(error)


run(
    {
        "model names": names,
        "n": several,
        "size": size,
        "quality": quality,
        "b64_json": b64_json,
        "url": url,
        "format": file_format,
        "ignored fields": ignored_fields,
        "own fields": own_fields,
        "usage": usage,
        "edit": edit_picture,
        "mask": edit_with_mask,
        "transparent": transparent,
        "errors": errors,
    }
)
