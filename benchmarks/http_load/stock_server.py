"""What a user would write in place of this server: FastAPI around the pipelines of diffusers.

`python -m benchmarks.http_load.stock_server --port 8000 --models '{…}'` answers `POST /v1/images` with a PNG file.
A lock lets one call of a pipeline run at a time. With `--batching` a thread waits for further requests of equal
model, size and number of steps, at most `window_s` from the arrival of the oldest one, and makes all of them in one
call. `PUT /batching` sets the window and the largest batch.
"""

import argparse
import asyncio
import io
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Lock, Thread
from typing import Any, NamedTuple

import diffusers.utils.logging
import torch
import uvicorn
from diffusers import DiffusionPipeline, QwenImagePipeline
from fastapi import FastAPI, Response
from PIL.Image import Image
from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class StockModel:
    """How a model is called. `steps` has the number of denoise steps of each budget."""

    directory: str
    guidance_scale: float
    max_sequence_length: int
    steps: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Batching:
    """At most `max_size` requests share a call. The oldest one waits at most `window_s` for others."""

    window_s: float
    max_size: int


class ImageBody(BaseModel):
    model: str
    prompt: str
    size: str
    seed: int
    budget: dict[str, Any] = {}

    @property
    def budget_name(self) -> str:
        """The budget's preset. There are no deadlines here."""
        return str(self.budget.get("preset", "default"))


class Call(NamedTuple):
    """What the requests of one call have in common."""

    model: str
    size: str
    num_steps: int


class Pipelines:
    """The loaded pipelines. One thread at a time may call them."""

    def __init__(self, models: Mapping[str, StockModel]) -> None:
        self._models = models
        self._pipelines: dict[str, Any] = {}
        for name, model in models.items():
            self._pipelines[name] = DiffusionPipeline.from_pretrained(model.directory, dtype=torch.float32)
            self._pipelines[name].set_progress_bar_config(disable=True)

    def call_for(self, body: ImageBody) -> Call:
        return Call(body.model, body.size, self._models[body.model].steps[body.budget_name])

    def images(self, call: Call, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image]:
        model, pipeline = self._models[call.model], self._pipelines[call.model]
        width, height = map(int, call.size.split("x"))
        options: dict[str, Any] = {"guidance_scale": model.guidance_scale}
        if isinstance(pipeline, QwenImagePipeline):
            options = {"true_cfg_scale": model.guidance_scale, "negative_prompt": [""] * len(prompts)}
        images: list[Image] = pipeline(
            prompt=[*prompts],
            width=width,
            height=height,
            num_inference_steps=call.num_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            max_sequence_length=model.max_sequence_length,
            **options,
        ).images
        return images


def png_of(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


class Waiting(NamedTuple):
    call: Call
    body: ImageBody
    arrived: float
    file: "Future[bytes]"


class Batcher:
    """Makes waiting requests in batches, in a thread of its own. The oldest request leads each batch."""

    def __init__(self, pipelines: Pipelines, batching: Batching) -> None:
        self.batching = batching
        self._pipelines = pipelines
        self._changed = Condition()
        self._waiting: list[Waiting] = []
        Thread(target=self._run, daemon=True).start()

    def submit(self, body: ImageBody) -> "Future[bytes]":
        waiting = Waiting(self._pipelines.call_for(body), body, time.monotonic(), Future())
        with self._changed:
            self._waiting.append(waiting)
            self._changed.notify()
        return waiting.file

    def _run(self) -> None:
        while True:
            batch = self._next_batch()
            try:
                prompts, seeds = zip(*((other.body.prompt, other.body.seed) for other in batch), strict=True)
                images = self._pipelines.images(batch[0].call, prompts, seeds)
                files = [png_of(image) for image in images]
            except Exception as error:
                for waiting in batch:
                    waiting.file.set_exception(error)
            else:
                for waiting, file in zip(batch, files, strict=True):
                    waiting.file.set_result(file)

    def _next_batch(self) -> list[Waiting]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting)
            first = self._waiting[0]
            ends = first.arrived + self.batching.window_s
            while len(batch := self._like(first)) < self.batching.max_size and (left := ends - time.monotonic()) > 0:
                self._changed.wait(left)
            self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
            return batch

    def _like(self, first: Waiting) -> list[Waiting]:
        return [waiting for waiting in self._waiting if waiting.call == first.call][: self.batching.max_size]


def create_app(pipelines: Pipelines, batching: Batching | None) -> FastAPI:
    app = FastAPI()

    @app.get("/readyz")
    def readyz() -> dict[str, str]:
        return {"status": "ready"}

    if batching is None:
        lock = Lock()

        @app.post("/v1/images")
        def generate(body: ImageBody) -> Response:
            with lock:
                (image,) = pipelines.images(pipelines.call_for(body), [body.prompt], [body.seed])
            return Response(png_of(image), media_type="image/png")

        return app

    batcher = Batcher(pipelines, batching)

    @app.post("/v1/images")
    async def generate_in_batch(body: ImageBody) -> Response:
        return Response(await asyncio.wrap_future(batcher.submit(body)), media_type="image/png")

    @app.put("/batching")
    def set_batching(window_s: float, max_size: int) -> None:
        batcher.batching = Batching(window_s, max_size)

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--models", required=True, help="JSON: a StockModel by the name of the model")
    parser.add_argument("--batching", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    models = {name: StockModel(**fields) for name, fields in json.loads(arguments.models).items()}
    app = create_app(Pipelines(models), Batching(0.05, 8) if arguments.batching else None)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
