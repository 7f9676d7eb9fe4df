"""The models under test: their held-out prompts or images, their unmodified denoise loop, and ours."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import engine as images
from benchmarks import meshes
from models.curve import EXACT, CurvePoint, Preset
from models.diffusion.sampling import euler_step
from models.families.hunyuan3d.checkpoint import load_checkpoint
from models.families.hunyuan3d.layout import find_config
from models.request import GenerationRequest, PresetBudget
from models.zoo import load_engine
from training.scenes.prompts import calibration_scenes, evaluation_scenes

Denoise = Callable[[], Tensor]
"""From noise and encoded prompts to latents `(batch, tokens, channels)`. To be called once."""

Prepare = Callable[[Sequence[Any]], Denoise]
"""Encodes requests. All have one number of steps."""

Step = Callable[[Tensor, Tensor, int], Tensor]
"""A solver's update: from velocity, latents and the index of the step to the next latents."""

_EXACT_BUDGET = PresetBudget(Preset.EXACT)


class Subject:
    """What the kinds of models have in common."""

    def __init__(self, directory: Path, router_weights: Path) -> None:
        self.directory, self.model = directory, directory.name
        self.engine = load_engine([directory], device="cpu", router_weights=router_weights)
        self.card = self.engine.cards[self.model]

    def ours(self, point: CurvePoint) -> Prepare:
        """Our engine's loop at a point, with all requests in one batch."""

        def prepare(requests: Sequence[GenerationRequest]) -> Denoise:
            states = [self.engine.start(request, point) for request in requests]

            def denoise() -> Tensor:
                while not states[0].is_done:
                    self.engine.step(states)
                return torch.cat([state.latents for state in states])

            return denoise

        return prepare

    def quality_samples(self, requests: Sequence[GenerationRequest], latents: Tensor) -> list[NDArray[Any]]:
        """What `engine.similarity` compares, one per request."""
        samples = []
        for request, own in zip(requests, latents.split(1), strict=True):
            state = self.engine.start(request, EXACT)
            state.latents, state.step_index = own, state.num_steps
            samples.append(self.engine.quality_sample(state))
        return samples


class ImageSubject(Subject):
    """A model with a pipeline of diffusers."""

    def requests(self, count: int, side: int | None = None) -> list[Any]:
        """Requests for held-out scenes at the model's defaults: half of one object, half of two to four.

        `side` in pixels replaces the default size.
        """
        scenes = evaluation_scenes(count - count // 2, count // 2)
        return [*images.requests_for(self.engine, self.model, scenes, _EXACT_BUDGET, side)]

    def calibration_requests(self, count: int) -> list[Any]:
        return [*images.requests_for(self.engine, self.model, calibration_scenes(count), _EXACT_BUDGET)]

    def pipeline(self) -> DiffusionPipeline:
        """The stock pipeline, loaded anew."""
        pipeline = DiffusionPipeline.from_pretrained(self.directory, dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def through(self, pipeline: DiffusionPipeline) -> Prepare:
        max_length = self.engine.max_sequence_length(self.model)

        def prepare(requests: Sequence[Any]) -> Denoise:
            inputs = images.stock_inputs(pipeline, requests, max_length)
            return lambda: pipeline(**inputs).images

        return prepare

    def stock(self) -> Prepare:
        return self.through(self.pipeline())


class MeshSubject(Subject):
    """Hunyuan3D, which has no pipeline in diffusers: the plain loop of `benchmarks.meshes` stands for it."""

    def __init__(self, directory: Path, router_weights: Path) -> None:
        super().__init__(directory, router_weights)
        self.checkpoint = load_checkpoint(directory, "cpu", torch.float32)

    def requests(self, count: int, side: int | None = None) -> list[Any]:
        """Requests for images of held-out solids at the model's defaults. Its latents have one size."""
        assert side is None
        return [*meshes.requests_for(self.engine, self.model, meshes.held_out_solids(count), _EXACT_BUDGET)]

    def stock(self) -> Prepare:
        def prepare(requests: Sequence[Any]) -> Denoise:
            sigmas = self.checkpoint.schedule(requests[0].num_inference_steps)

            def step(velocity: Tensor, latents: Tensor, index: int) -> Tensor:
                return euler_step(latents, velocity, sigmas[index], sigmas[index + 1])

            return self.loop(requests, step)

        return prepare

    def loop(self, requests: Sequence[Any], step: Step) -> Denoise:
        """The plain loop over the published times, with a solver's `step`."""
        noise, context = meshes.stock_inputs(self.checkpoint, requests)
        request = requests[0]
        sigmas = self.checkpoint.schedule(request.num_inference_steps)

        @torch.inference_mode()
        def denoise() -> Tensor:
            latents = noise
            for index, (sigma, next_sigma) in enumerate(pairwise(sigmas)):
                if next_sigma > sigma:
                    velocity = meshes.velocity(self.checkpoint, latents, sigma, context, request.guidance_scale)
                    latents = step(velocity, latents, index)
            return latents

        return denoise


def load_subject(directory: Path, router_weights: Path) -> ImageSubject | MeshSubject:
    return (MeshSubject if find_config(directory) else ImageSubject)(directory, router_weights)


def in_batches(requests: Sequence[Any], size: int) -> Iterable[Sequence[Any]]:
    for first in range(0, len(requests), size):
        yield requests[first : first + size]
