"""The bodies that front ends send for an image, by their sources, to a server with the documented aliases."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types import ImagesResponse

from service.settings import Settings

ALIASES = "gpt-image-*=drawn,chatgpt-image-*=drawn,dall-e-*=drawn"

BODIES: dict[str, dict[str, Any]] = {
    "Open WebUI": {"model": "dall-e-2", "n": 1, "size": "512x512", "response_format": "b64_json"},
    "LibreChat": {
        "model": "gpt-image-1",
        "n": 10,
        "background": "auto",
        "output_format": "png",
        "quality": "auto",
        "size": "auto",
    },
    "LibreChat with WebP": {
        "model": "gpt-image-1",
        "n": 1,
        "background": "opaque",
        "output_format": "webp",
        "output_compression": 100,
        "quality": "high",
        "size": "1024x1024",
    },
    "LiteLLM": {
        "model": "gpt-image-1.5",
        "background": "auto",
        "moderation": "low",
        "n": 2,
        "output_compression": 100,
        "output_format": "jpeg",
        "quality": "medium",
        "response_format": "b64_json",
        "size": "1024x1024",
        "style": "natural",
        "user": "somebody",
    },
    "Vercel AI SDK": {"model": "drawn", "n": 10, "size": "1024x1024", "response_format": "b64_json", "seed": 7},
    "LangChain": {
        "model": "dall-e-3",
        "n": 1,
        "size": "1024x1024",
        "response_format": "url",
        "style": "vivid",
        "quality": "standard",
        "user": None,
    },
    "LangChain for Python": {"model": "dall-e-2", "n": 1, "size": "1024x1024"},
    "n8n": {
        "model": "dall-e-3",
        "response_format": "url",
        "quality": "hd",
        "size": "1024x1024",
        "style": "natural",
    },
    "LobeChat": {"model": "gpt-image-1", "n": 1},
    "LobeChat with a card of DALL-E": {
        "model": "dall-e-3",
        "n": 1,
        "response_format": "b64_json",
        "quality": "standard",
        "size": "1024x1024",
    },
    "LobeChat with a card of FLUX": {
        "model": "drawn",
        "n": 1,
        "cfg": 3.5,
        "height": 1024,
        "width": 1024,
        "seed": None,
        "steps": 4,
    },
    "OpenAI": {
        "model": "gpt-image-2.6-flare",
        "background": "opaque",
        "complexity": "high",
        "moderation": "auto",
        "n": 1,
        "output_compression": 80,
        "output_format": "webp",
        "quality": "xhigh",
        "safety_identifier": "hash",
        "size": "1024x1024",
    },
}


@pytest.mark.parametrize("body", [pytest.param(body, id=name) for name, body in BODIES.items()])
def test_front_end_gets_its_images(body: dict[str, Any], start_client: Callable[..., TestClient]) -> None:
    client = start_client(Settings.model_validate({"models": "drawn", "model_aliases": ALIASES}))
    response = client.post("/v1/images/generations", json={"prompt": "a red circle", **body})
    assert response.status_code == 200
    answer = ImagesResponse.model_validate(response.json(), strict=True)
    assert answer.data is not None
    assert len(answer.data) == body.get("n", 1)
    wanted = body.get("response_format", "url" if body["model"].startswith("dall-e-") else "b64_json")
    assert all(getattr(image, wanted) for image in answer.data)
    assert answer.usage is not None
    assert answer.usage.total_tokens > 0
