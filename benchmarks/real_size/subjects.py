"""The models that are measured: published sizes, random weights, random prompt embeddings of realistic length.

Random weights say nothing about quality and do not change times. There are no text encoders.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from torch import Tensor, nn

from models.card import Guidance
from models.curve import EXACT, Preset
from models.diffusion.sampling import rising_flow_schedule
from models.elastic.router import RouterStack
from models.families.flux.pipeline import FluxFamily
from models.families.hunyuan3d.checkpoint import Hunyuan3DCheckpoint
from models.families.hunyuan3d.conditioner import SingleImageEncoder
from models.families.hunyuan3d.pipeline import Hunyuan3DFamily
from models.families.hunyuan3d.plain_dit import HunYuanDiTPlain
from models.families.hunyuan3d.preparation import ImageSettings
from models.families.hunyuan3d.shape_vae import DecodedField, ShapeVAE
from models.families.image import Branch, ImageFamily
from models.families.qwen_image.pipeline import QwenImageFamily
from models.memory import ImageMemory
from models.request import ImageRequest, PresetBudget
from models.rules.forecast import ForecastTable
from models.state import BranchInputs
from models.weights import CheckpointTraits, RouterWeights

CALIBRATED_STEPS = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """Arguments of a transformer and of its VAE, the prompt tokens of each guidance branch, and sides in pixels."""

    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    num_text_tokens: Mapping[str, int]
    sides: Sequence[int]


class _Prompts:
    """Random prompt embeddings `(1, tokens, channels)` by guidance branch."""

    def __init__(self, transformer: Any, num_text_tokens: Mapping[str, int]) -> None:
        channels = transformer.config.joint_attention_dim
        torch.manual_seed(0)
        like = {"device": transformer.device, "dtype": transformer.dtype}
        self.embeds = {branch: torch.randn(1, count, channels, **like) for branch, count in num_text_tokens.items()}


class RandomFlux(FluxFamily):
    """FLUX.1-dev. Any prompt becomes the same random embedding."""

    def __init__(self, pipeline: DiffusionPipeline, scale: Scale, routers: RouterWeights | None) -> None:
        super().__init__("flux", pipeline, routers)
        self._prompts = _Prompts(self.transformer, scale.num_text_tokens)
        self._pooled = self._prompts.embeds["cond"].new_ones(1, self.transformer.config.pooled_projection_dim)

    @property
    def max_sequence_length(self) -> int:
        return self._prompts.embeds["cond"].shape[1]

    def _text_encoder_bytes(self) -> Iterator[int]:
        return iter(())

    def _encode(self, branch: Branch, pictures: Sequence[Image.Image]) -> BranchInputs:
        return BranchInputs(self.transformer.context_embedder(self._prompts.embeds[branch.name]), self._pooled)

    def stock_inputs(self, count: int) -> dict[str, Any]:
        """The prompts' arguments of the stock pipeline, for `count` images."""
        embeds = self._prompts.embeds["cond"].expand(count, -1, -1)
        return {
            "prompt_embeds": embeds,
            "pooled_prompt_embeds": self._pooled.expand(count, -1),
            "guidance_scale": GUIDANCE,
        }


class RandomQwenImage(QwenImageFamily):
    """Qwen-Image. Prompts of one branch become the same random embedding."""

    def __init__(self, pipeline: DiffusionPipeline, scale: Scale, routers: RouterWeights | None) -> None:
        super().__init__("qwen-image", pipeline, routers, CheckpointTraits())
        self._prompts = _Prompts(self.transformer, scale.num_text_tokens)

    @property
    def max_sequence_length(self) -> int:
        return self._prompts.embeds["cond"].shape[1]

    def _text_encoder_bytes(self) -> Iterator[int]:
        return iter(())

    def memory(self) -> ImageMemory:
        template_tokens = self._prompts.embeds["uncond"].shape[1]  # the negative prompt is empty
        return replace(ImageFamily.memory(self), pads_prompts=False, template_tokens=template_tokens)

    def _encode(self, branch: Branch, pictures: Sequence[Image.Image]) -> BranchInputs:
        embeds = self._prompts.embeds[branch.name]
        return BranchInputs(self.transformer.txt_in(self.transformer.txt_norm(embeds)))

    def stock_inputs(self, count: int) -> dict[str, Any]:
        """The prompts' arguments of the stock pipeline, for `count` images."""
        inputs: dict[str, Any] = {"true_cfg_scale": GUIDANCE}
        for prefix, embeds in zip(("", "negative_"), self._prompts.embeds.values(), strict=True):
            inputs[f"{prefix}prompt_embeds"] = embeds.expand(count, -1, -1)
            inputs[f"{prefix}prompt_embeds_mask"] = torch.ones(count, embeds.shape[1], device=embeds.device)
        return inputs


GUIDANCE = 4.0
Subject = RandomFlux | RandomQwenImage


def stock_pipeline(family: Subject, *, is_compiled: bool = False) -> Any:
    """The unmodified pipeline with the family's weights; compiled as diffusers advises."""
    components = {**family.pipeline.components}
    if is_compiled:
        transformer = components["transformer"]
        shared = {id(tensor): tensor for tensor in (*transformer.parameters(), *transformer.buffers())}
        components["transformer"] = copy.deepcopy(transformer, memo=shared)
        components["transformer"].compile_repeated_blocks()
    pipeline = type(family.pipeline)(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def requests(family: Subject, side: int, count: int, num_steps: int) -> list[ImageRequest]:
    is_guided = family.guidance is Guidance.TRUE
    # As the bytes of a prompt bound its tokens, this one has as many as its embedding.
    embeds = [*family._prompts.embeds.values()]
    prompt = "x" * (embeds[0].shape[1] - embeds[-1].shape[1])
    return [
        ImageRequest(
            model=family.model_id,
            prompt=prompt,
            height=side,
            width=side,
            num_inference_steps=num_steps,
            guidance_scale=GUIDANCE,
            seed=seed,
            budget=PresetBudget(Preset.EXACT),
            point=EXACT,
            is_guided=is_guided,
        )
        for seed in range(count)
    ]


def stock_latents(pipeline: Any, family: Subject, requests: Sequence[ImageRequest]) -> Tensor:
    """What the pipeline makes of the requests, `(requests, tokens, channels)`."""
    with torch.inference_mode():
        latents: Tensor = pipeline(
            **family.stock_inputs(len(requests)),
            height=requests[0].height,
            width=requests[0].width,
            num_inference_steps=requests[0].num_inference_steps,
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            output_type="latent",
        ).images
    return latents


@dataclass(frozen=True, slots=True)
class ImageModel:
    """A published image model: its full size, a reduced one for a CPU, and its classes."""

    full: Scale
    reduced: Scale
    family: type[Subject]
    pipeline: type[DiffusionPipeline]
    transformer: type[nn.Module]
    vae: type[nn.Module]

    def build(self, scale: Scale, device: torch.device, dtype: torch.dtype, *, has_routers: bool = True) -> Subject:
        """The model, initialised randomly on the device and in `dtype`."""
        transformer = random_module(partial(self.transformer, **scale.transformer), device, dtype)
        parts = {
            "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            "transformer": transformer,
            "vae": random_module(partial(self.vae, **scale.vae), device, dtype),
        }
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        absent = dict.fromkeys(names if self.pipeline is FluxPipeline else names[:2])
        routers = random_routers(transformer) if has_routers else None
        family = self.family(self.pipeline(**parts, **absent), scale, routers)
        family.forecast_table = _forecast_table(is_guided=family.guidance is Guidance.TRUE)
        return family


def random_module(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """The module that `build` returns, initialised by PyTorch on the device and in `dtype`."""
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


def _forecast_table(*, is_guided: bool) -> ForecastTable:
    """Of no model: forecasts cost the same, whatever they say."""
    size = (3 if is_guided else 2) * CALIBRATED_STEPS + 1
    gram = np.eye(size) + np.ones((size, size))
    return ForecastTable(np.linspace(1, 0, CALIBRATED_STEPS + 1), gram, np.ones(CALIBRATED_STEPS + 1))


class RandomHunyuan3D(Hunyuan3DFamily):
    """Hunyuan3D-2.1. Fields are read from the network at the usual cost, but show a ball: random weights have no
    surface worth the name."""

    def _field(self, latents: Tensor) -> DecodedField:
        field = super()._field(latents)

        def ball(points: Tensor) -> Tensor:
            field(points)
            return torch.sub(0.6, points.norm(dim=-1))

        return ball


def random_hunyuan3d(device: torch.device, dtype: torch.dtype, *, is_reduced: bool) -> RandomHunyuan3D:
    """The published size, or a small one."""
    width, heads, depth, tokens = (64, 4, 5, 64) if is_reduced else (2048, 16, 21, 4096)
    vae_width, vae_layers = (64, 2) if is_reduced else (1024, 16)
    dino = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4} if is_reduced else _DINO_LARGE
    side = 56 if is_reduced else 518
    encoder = {"config": {**dino, "image_size": side, "patch_size": 14}, "image_size": side}
    denoiser = partial(
        HunYuanDiTPlain,
        in_channels=64,
        hidden_size=width,
        context_dim=dino["hidden_size"],
        depth=depth,
        num_heads=heads,
        num_moe_layers=2 if is_reduced else 6,
        num_experts=8,
        moe_top_k=2,
        qkv_bias=False,
        qk_norm=True,
    )
    vae = partial(
        ShapeVAE,
        num_latents=tokens,
        embed_dim=64,
        width=vae_width,
        heads=heads,
        num_decoder_layers=vae_layers,
        include_pi=False,
        qkv_bias=False,
        qk_norm=True,
        with_encoder=False,
    )
    conditioner = partial(SingleImageEncoder, main_image_encoder={"type": "DinoImageEncoder", "kwargs": encoder})
    checkpoint = Hunyuan3DCheckpoint(
        denoiser=random_module(denoiser, device, dtype),
        vae=random_module(vae, device, torch.float16 if dtype is torch.bfloat16 else dtype),
        conditioner=random_module(conditioner, device, dtype),
        image_settings=ImageSettings(),
        schedule=partial(rising_flow_schedule, shift=1.0),
        is_consistency_model=False,
    )
    return RandomHunyuan3D("hunyuan3d", checkpoint, None)


_DINO_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_REDUCED = {"attention_head_dim": 64, "num_attention_heads": 4, "axes_dims_rope": (16, 24, 24)}
_FLUX_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# 60 tokens are a long sentence and the template's end; the negative prompt is that end alone.
_QWEN_TOKENS = {"cond": 60, "uncond": 6}

IMAGE_MODELS: Mapping[str, ImageModel] = {
    "flux": ImageModel(
        Scale(
            {"guidance_embeds": True},
            {**_FLUX_VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
            {"cond": 512},
            (1024, 512),
        ),
        Scale(
            {**_REDUCED, "guidance_embeds": True, "num_layers": 2, "num_single_layers": 6},
            {**_FLUX_VAE, "block_out_channels": (32, 32, 32, 32)},
            {"cond": 32},
            (256, 128),
        ),
        RandomFlux,
        FluxPipeline,
        FluxTransformer2DModel,
        AutoencoderKL,
    ),
    "qwen-image": ImageModel(
        Scale({}, {}, _QWEN_TOKENS, (1024, 512)),
        Scale({**_REDUCED, "num_layers": 6}, {"base_dim": 8}, _QWEN_TOKENS, (256, 128)),
        RandomQwenImage,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
        AutoencoderKLQwenImage,
    ),
}
