"""A server with ELASTIC_COMPILE: the blocks of a small FLUX are compiled in the worker's thread before it is ready."""

import base64
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

from models.card import ImageCard
from models.engine import Engine
from models.request import ImageRequest
from models.zoo import load_engine
from service.app import build_dispatcher, create_app
from service.settings import Settings
from tests.fixtures.tiny_flux import save_flux

pytestmark = [
    pytest.mark.long,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),  # torch's own
]
TOLERANCE = 1e-5
REQUESTS: list[dict[str, Any]] = [
    {"size": "64x64"},
    {"size": "96x64", "n": 3},
    {"size": "64x128", "n": 4, "prompt": "a red circle " * 9},
]


class Server(NamedTuple):
    client: TestClient
    compiled: Engine
    plain: Engine


@pytest.fixture(scope="module")
def compiled_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The client of a server, its engine, and an engine without compiled blocks."""
    root = tmp_path_factory.mktemp("compiled")
    model = root / "tiny-flux"
    save_flux(model, guidance_embeds=True)
    (root / "routers" / model.name).mkdir(parents=True)
    defaults = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 3.5}
    manifest = {"license": "mit", "defaults": defaults}
    (root / "routers" / model.name / "manifest.json").write_text(json.dumps(manifest))
    settings = Settings(models=(model,), router_weights=root / "routers", compile=True, max_batch_size=4)
    plain = load_engine([model], device="cpu", router_weights=settings.router_weights)
    engines: list[Engine] = []

    def load() -> Engine:
        options, routers = settings.load_options, settings.router_weights
        engines.append(load_engine([model], device="cpu", router_weights=routers, options=options))
        return engines[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "inductor"))
        dispatcher = build_dispatcher(settings, load)
        dispatcher.worker.start()
        with TestClient(create_app(settings, dispatcher), base_url="http://localhost") as client:
            yield Server(client, engines[0], plain)


def test_server_answers_at_all_sizes_and_batches_without_compiling_again(compiled_server: Server) -> None:
    for fields in REQUESTS:
        body = {"prompt": "a blue square", "seed": 1, "output_format": "png", **fields}
        answer = compiled_server.client.post("/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        width, height = map(int, fields["size"].split("x"))
        for item in answer.json()["data"]:
            assert Image.open(BytesIO(base64.b64decode(item["b64_json"]))).size == (width, height)
    page = compiled_server.client.get("/metrics").text
    assert "# TYPE elastic_compiled_graphs_total counter" in page
    assert "elastic_compiled_graphs_total{" not in page


def request_of(engine: Engine, **fields: object) -> ImageRequest:
    (card,) = engine.cards.values()
    assert isinstance(card, ImageCard)
    (family,) = engine._families.values()
    request = family.example_request(card)
    assert isinstance(request, ImageRequest)
    return replace(request, **fields)  # type: ignore[arg-type]


def run(engine: Engine, requests: list[ImageRequest]) -> tuple[list[Tensor], list[np.ndarray]]:
    """The latents and the images of requests that share their steps, none of which may compile."""
    states = [engine.start(request) for request in requests]
    while not states[0].is_done:
        assert engine.step(states).compiled == ()
    return [state.latents for state in states], [np.asarray(engine.finish(state)) for state in states]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_results_in_any_batch_are_those_of_uncompiled_blocks(compiled_server: Server, batch_size: int) -> None:
    prompts = ["", "a blue square", "a large red circle on the left", "red"][:batch_size]
    requests = [
        request_of(compiled_server.plain, prompt=prompt, seed=seed, width=80) for seed, prompt in enumerate(prompts)
    ]
    latents, images = run(compiled_server.compiled, requests)
    for request, found, image in zip(requests, latents, images, strict=True):
        (expected,), (exact,) = run(compiled_server.plain, [request])
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
        assert compiled_server.plain.similarity(request.model, image, exact) > 0.9999


def test_changed_weight_takes_effect_without_compiling(compiled_server: Server) -> None:
    (family,) = compiled_server.compiled._families.values()
    request = request_of(compiled_server.plain)
    (before,), _ = run(compiled_server.compiled, [request])
    weight = family.transformer.single_transformer_blocks[1].proj_mlp.weight
    with torch.no_grad():
        weight.mul_(2)
    try:
        (after,), _ = run(compiled_server.compiled, [request])
    finally:
        with torch.no_grad():
            weight.div_(2)
    assert not torch.allclose(before, after, atol=1e-3)
    assert torch.equal(run(compiled_server.compiled, [request])[0][0], before)
