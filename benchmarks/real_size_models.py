"""The transformers that `benchmarks.real_size` times: published sizes, random weights, random prompt embeddings.

Random weights say nothing about quality and do not change times. There is no text encoder and no autoencoder.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor, nn

from models.diffusion.sampling import euler_step
from models.elastic.router import RouterStack
from models.families.flux.pipeline import FluxFamily
from models.families.image import Branch, ImageFamily
from models.families.qwen_image.pipeline import QwenImageFamily, pad_prompts
from models.request import ImageRequest
from models.state import BranchInputs, DenoiseState
from models.weights import CheckpointTraits, RouterWeights

StockStep = Callable[[Sequence[DenoiseState]], list[Tensor]]
"""A denoise step of the stock pipeline: from states to their next latents, `(1, tokens, channels)` each."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A transformer's configuration, the prompt tokens of each guidance branch, and the sizes to measure."""

    config: Mapping[str, Any]
    num_text_tokens: Mapping[str, int]
    sides: Sequence[int]
    batch_sizes: Sequence[int]


@dataclass(frozen=True, slots=True)
class Subject:
    """A family to measure, and the steps that the stock pipeline would take with its transformer, by name."""

    family: ImageFamily
    stock_steps: Mapping[str, StockStep]


@dataclass(frozen=True, slots=True)
class Model:
    """A published model: its full size, a reduced one for a CPU, and how to build either."""

    full: Scale
    reduced: Scale
    build: Callable[[Scale, torch.device, torch.dtype], Subject]


class RandomFlux(FluxFamily):
    """FLUX.1 with random weights. Any prompt becomes the same random embedding."""

    def __init__(self, scale: Scale, device: torch.device, dtype: torch.dtype) -> None:
        transformer = random_module(lambda: FluxTransformer2DModel(**scale.config), device, dtype)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer,
        )
        super().__init__("flux", pipeline, random_routers(transformer))
        self.prompt_embeds = random_prompts(transformer, scale)
        self.pooled = torch.randn(1, transformer.config.pooled_projection_dim, device=device, dtype=dtype)

    def _encode(self, branch: Branch, pictures: Sequence[Image.Image]) -> BranchInputs:
        return BranchInputs(self.transformer.context_embedder(self.prompt_embeds[branch.name]), self.pooled)

    @torch.inference_mode()
    def stock_step(self, states: Sequence[DenoiseState]) -> list[Tensor]:
        """One call for all states; FLUX's guidance is distilled, so there is one branch."""
        request, count = states[0].request, len(states)
        assert isinstance(request, ImageRequest)
        embeds = self.prompt_embeds["cond"]
        _, image_ids = self.pipeline.prepare_latents(
            1, 16, request.height, request.width, embeds.dtype, embeds.device, None, states[0].latents
        )
        latents = torch.cat([state.latents for state in states])
        times = torch.stack([state.timesteps[state.step_index] for state in states])
        velocity = self.transformer(
            hidden_states=latents,
            timestep=times.to(latents.device) / 1000,
            guidance=torch.cat([state.inputs[0].guidance for state in states]),  # type: ignore[misc]  # FLUX.1-dev's
            pooled_projections=self.pooled.expand(count, -1),
            encoder_hidden_states=embeds.expand(count, -1, -1),
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return next_latents(self, states, [velocity])


class RandomQwenImage(QwenImageFamily):
    """Qwen-Image with random weights. Prompts of one branch become the same random embedding."""

    def __init__(self, scale: Scale, device: torch.device, dtype: torch.dtype) -> None:
        transformer = random_module(lambda: QwenImageTransformer2DModel(**scale.config), device, dtype)
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
        super().__init__("qwen-image", pipeline, random_routers(transformer), CheckpointTraits())
        self.prompt_embeds = random_prompts(transformer, scale)

    def _encode(self, branch: Branch, pictures: Sequence[Image.Image]) -> BranchInputs:
        embeds = self.prompt_embeds[branch.name]
        return BranchInputs(self.transformer.txt_in(self.transformer.txt_norm(embeds)))

    @torch.inference_mode()
    def stock_step(self, states: Sequence[DenoiseState]) -> list[Tensor]:
        """One call per guidance branch, as the stock pipeline does it."""
        branches = [embeds.expand(len(states), -1, -1) for embeds in self.prompt_embeds.values()]
        return next_latents(self, states, [self._velocity(states, embeds, None) for embeds in branches])

    @torch.inference_mode()
    def stock_step_in_one_call(self, states: Sequence[DenoiseState]) -> list[Tensor]:
        """All branches in one call, with the shorter prompts padded and masked."""
        embeds, mask = pad_prompts([e for e in self.prompt_embeds.values() for _ in states])
        return next_latents(self, states, self._velocity(states, embeds, mask).split(len(states)))

    def _velocity(self, states: Sequence[DenoiseState], embeds: Tensor, mask: Tensor | None) -> Tensor:
        request, count = states[0].request, len(embeds)
        assert isinstance(request, ImageRequest)
        latents = torch.cat([state.latents for state in states]).repeat(count // len(states), 1, 1)
        time = states[0].timesteps[states[0].step_index].to(latents) / 1000
        shape = (1, request.height // self.pixels_per_token, request.width // self.pixels_per_token)
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=time.expand(count),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[shape]] * count,
            return_dict=False,
        )[0]
        return velocity


def flux(scale: Scale, device: torch.device, dtype: torch.dtype) -> Subject:
    family = RandomFlux(scale, device, dtype)
    return Subject(family, {"stock": family.stock_step})


def qwen_image(scale: Scale, device: torch.device, dtype: torch.dtype) -> Subject:
    family = RandomQwenImage(scale, device, dtype)
    return Subject(family, {"stock": family.stock_step, "stock, one call": family.stock_step_in_one_call})


def next_latents(family: ImageFamily, states: Sequence[DenoiseState], velocities: Sequence[Tensor]) -> list[Tensor]:
    """Guidance and the sampler's update. `velocities` has `(states, tokens, channels)` for each branch."""
    updated = []
    for i, state in enumerate(states):
        own = torch.cat([velocity[i : i + 1] for velocity in velocities])
        guided = own[:1] if len(own) == 1 else family.guide(state.request, own)
        sigma, next_sigma = state.sigmas[state.step_index], state.sigmas[state.step_index + 1]
        updated.append(euler_step(state.latents, guided, sigma, next_sigma))
    return updated


def random_module(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """The module that `build` returns, initialised randomly by PyTorch on the device and in `dtype`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            torch.manual_seed(0)
            return build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def random_routers(transformer: Any) -> RouterWeights:
    num_blocks = sum(len(part) for name, part in transformer.named_children() if name.endswith("transformer_blocks"))
    stack = random_module(lambda: RouterStack(num_blocks, transformer.inner_dim), transformer.device, transformer.dtype)
    return RouterWeights(stack)


def random_prompts(transformer: Any, scale: Scale) -> Mapping[str, Tensor]:
    """Prompt embeddings `(1, tokens, channels)` by guidance branch."""
    channels = transformer.config.joint_attention_dim
    return {
        branch: torch.randn(1, count, channels, device=transformer.device, dtype=transformer.dtype)
        for branch, count in scale.num_text_tokens.items()
    }


_REDUCED = {"attention_head_dim": 64, "num_attention_heads": 4, "axes_dims_rope": (16, 24, 24)}
# 60 tokens are a long sentence and the template's end; the negative prompt is a blank and that end.
_QWEN_TOKENS = {"cond": 60, "uncond": 6}

MODELS: Mapping[str, Model] = {
    "flux": Model(
        Scale({"guidance_embeds": True}, {"cond": 512}, (1024, 512), (1, 2, 4)),
        Scale(
            {**_REDUCED, "guidance_embeds": True, "num_layers": 2, "num_single_layers": 6},
            {"cond": 32},
            (256, 128),
            (1, 2),
        ),
        flux,
    ),
    "qwen-image": Model(
        Scale({}, _QWEN_TOKENS, (1024, 512), (1, 2, 4)),
        Scale({**_REDUCED, "num_layers": 6}, _QWEN_TOKENS, (256, 128), (1, 2)),
        qwen_image,
    ),
}
