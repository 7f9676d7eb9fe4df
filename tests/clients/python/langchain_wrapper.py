"""LangChain's DallEAPIWrapper for Python. It reads the `url` of every picture, and never asks for links."""

import openai
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper

from tests.clients.python.checks import PROMPT, error_of, image_behind, run, target

TARGET = target()


def wrapper(**fields: object) -> DallEAPIWrapper:
    """Its default size is 1024x1024, which is too large for the tiny models."""
    server = {"base_url": TARGET.base_url, "api_key": TARGET.api_key, "max_retries": 0, "size": "256x256"}
    return DallEAPIWrapper.model_validate(server | fields)


def url() -> None:
    assert image_behind(wrapper().run(PROMPT)).size == (256, 256)


def names() -> None:
    for name in ("dall-e-2", "dall-e-3"):
        assert image_behind(wrapper(model=name, size="64x64").run(PROMPT)).size == (64, 64)


def several() -> None:
    links = wrapper(n=2, size="64x64").run(PROMPT).split("\n")
    assert [image_behind(link).size for link in links] == [(64, 64)] * 2


def quality() -> None:
    for word in ("standard", "hd"):
        assert image_behind(wrapper(model="dall-e-3", quality=word, size="64x64").run(PROMPT)).size == (64, 64)


def errors() -> None:
    error = error_of(lambda: wrapper(api_key="sk-wrong").run(PROMPT))
    assert isinstance(error, openai.AuthenticationError), repr(error)
    assert error.code == "invalid_api_key"


run({"url": url, "model names": names, "n": several, "quality": quality, "errors": errors})
