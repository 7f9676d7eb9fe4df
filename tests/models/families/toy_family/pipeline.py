"""The toy family: latents are pixels of 8 x 8, prompts are letters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.card import Guidance, ImageCard, ModelCard, SizeLimits, basics_of
from models.curve import EXACT, Preset
from models.diffusion.sampling import classifier_free_guidance
from models.elastic.compute import BlockCost
from models.elastic.streams import Streams
from models.families.family import Beginning, BranchStart, Family
from models.families.wrapping import Adapter
from models.load_options import LoadOptions
from models.loading import stream_module
from models.request import GenerationRequest, ImageRequest, PresetBudget
from models.state import BranchInputs, DenoiseState
from models.weights import CheckpointTraits, Manifest, RouterWeights
from tests.models.families.toy_family import adapter
from tests.models.families.toy_family.transformer import NUM_LETTERS, ToyTransformer

PROMPT_LENGTH = 8
PIXELS = 8


def letters_of(prompt: str) -> Tensor:
    codes = [ord(letter) % NUM_LETTERS for letter in prompt[:PROMPT_LENGTH].ljust(PROMPT_LENGTH)]
    return torch.tensor([codes])


def _num_tokens(request: ImageRequest) -> int:
    return request.height // PIXELS * (request.width // PIXELS)


class ToyFamily(Family):
    adapter: Adapter = adapter
    quality_metric: ClassVar[str] = "mean_difference"

    @classmethod
    def load(
        cls,
        directory: Path,
        device: str,
        dtype: torch.dtype,
        router_weights: RouterWeights | None,
        traits: CheckpointTraits,
        options: LoadOptions,
    ) -> Self:
        transformer = stream_module(
            ToyTransformer, directory / "transformer", device, dtype, in_float8=options.has_float8
        )
        return cls(directory.name, transformer.requires_grad_(False), router_weights)

    @property
    def guidance(self) -> Guidance:
        return Guidance.TRUE

    @property
    def default_num_inference_steps(self) -> int:
        return 3

    @property
    def default_guidance_scale(self) -> float:
        return 2.0

    def card(self, basics: ModelCard, manifest: Manifest) -> ImageCard:
        return ImageCard(
            **basics_of(basics),
            default_height=32,
            default_width=32,
            sizes=SizeLimits(PIXELS, PIXELS, 64),
            max_prompt_characters=PROMPT_LENGTH,
        )

    def example_request(self, card: ModelCard) -> ImageRequest:
        return ImageRequest(
            model=card.id,
            prompt="",
            height=32,
            width=32,
            num_inference_steps=card.default_num_inference_steps,
            guidance_scale=card.default_guidance_scale,
            seed=0,
            budget=PresetBudget(Preset.EXACT),
            point=EXACT,
            is_guided=card.is_guided(card.default_guidance_scale),
        )

    def encode(self, request: GenerationRequest) -> list[BranchStart]:
        assert isinstance(request, ImageRequest)
        square = 2.0 * adapter.channels(self.transformer) ** 2
        tokens = PROMPT_LENGTH + _num_tokens(request)
        costs = {block.name: BlockCost(fixed=square, mlp=square * 8 * tokens) for block in self.blocks}
        prompts = {"cond": request.prompt, "uncond": request.negative_prompt or ""}
        return [
            BranchStart(name, BranchInputs(self.transformer.text_in(letters_of(prompt))), costs)
            for name, prompt in prompts.items()
        ]

    def begin(self, request: GenerationRequest, branches: Sequence[BranchStart]) -> Beginning:
        assert isinstance(request, ImageRequest)
        sigmas = torch.linspace(1, 0, request.num_inference_steps + 1)
        noise = torch.randn(1, _num_tokens(request), 3, generator=torch.Generator().manual_seed(request.seed))
        return Beginning((request.height, request.width), noise, sigmas, sigmas[:-1])

    def prologue(self, states: Sequence[DenoiseState]) -> Streams:
        latents, times = self._latents_and_times(states)
        context = torch.cat([branch.context for state in states for branch in state.inputs])
        return adapter.prologue(self.transformer, latents, times, context)

    def guide(self, request: GenerationRequest, velocities: Tensor) -> Tensor:
        return classifier_free_guidance(velocities[:1], velocities[1:], request.guidance_scale)

    def decode(self, state: DenoiseState) -> NDArray[np.uint8]:
        return self.preview(state.request, state.latents).repeat(PIXELS, 0).repeat(PIXELS, 1)

    def preview(self, request: GenerationRequest, prediction: Tensor) -> NDArray[np.uint8]:
        assert isinstance(request, ImageRequest)
        pixels = prediction.view(request.height // PIXELS, request.width // PIXELS, 3)
        return (127.5 * (pixels.clamp(-1, 1) + 1)).round().byte().numpy()

    def quality_sample(self, state: DenoiseState) -> NDArray[np.uint8]:
        return self.decode(state)

    def similarity(self, a: NDArray[Any], b: NDArray[Any]) -> float:
        return 1 - float(np.abs(a.astype(float) - b.astype(float)).mean()) / 255
