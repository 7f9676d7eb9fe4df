"""The transformers of the tiny image models: FLUX.1 and Qwen-Image in small."""

from collections.abc import Mapping
from functools import cached_property

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor, nn

from models.elastic.streams import Streams
from models.families.flux import adapter as flux
from models.families.qwen_image import adapter as qwen_image
from models.families.wrapping import Mlp
from training.lesson import Condition
from training.scenes.text import MAX_SEQUENCE_LENGTH, QWEN_SEQUENCE_LENGTH

CELLS = 8
"""Image tokens along each side of the training images."""


class _WithoutLongSkips:
    """Base of transformers without long skips: there is no work between blocks."""

    transformer: FluxTransformer2DModel | QwenImageTransformer2DModel

    def enter(self, index: int, streams: Streams) -> Streams:
        return streams

    def leave(self, index: int, streams: Streams) -> Streams:
        return streams

    def compile_blocks(self) -> None:
        self.transformer.compile_repeated_blocks(dynamic=False)


class FluxBackbone(_WithoutLongSkips):
    """A `training.backbone.Backbone` of FLUX.1."""

    has_guidance_embedding = True

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        self.transformer = transformer
        self.channels: int = flux.channels(transformer)
        self.blocks = flux.blocks(transformer)

    @cached_property
    def _rotary(self) -> tuple[Tensor, Tensor]:
        return flux.rotary_embedding(self.transformer, MAX_SEQUENCE_LENGTH, CELLS, CELLS)

    def prologue(self, latents: Tensor, timestep: Tensor, guidance: Tensor, condition: Condition) -> Streams:
        assert condition.pooled is not None
        context = self.transformer.context_embedder(condition.embeds)
        return flux.prologue(self.transformer, latents, timestep, guidance, context, condition.pooled, self._rotary)

    def call_block(self, block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        return flux.call_block(block, streams)

    def mlps(self, block: nn.Module) -> Mapping[str, Mlp]:
        return flux.mlps(block)

    def epilogue(self, streams: Streams) -> Tensor:
        return flux.epilogue(self.transformer, streams)


class QwenImageBackbone(_WithoutLongSkips):
    """A `training.backbone.Backbone` of Qwen-Image."""

    has_guidance_embedding = False

    def __init__(self, transformer: QwenImageTransformer2DModel) -> None:
        self.transformer = transformer
        self.channels: int = qwen_image.channels(transformer)
        self.blocks = qwen_image.blocks(transformer)

    @cached_property
    def _rotary(self) -> tuple[Tensor, Tensor]:
        return qwen_image.rotary_embedding(self.transformer, QWEN_SEQUENCE_LENGTH, CELLS, CELLS)

    def prologue(self, latents: Tensor, timestep: Tensor, guidance: Tensor, condition: Condition) -> Streams:
        context = qwen_image.embed_prompt(self.transformer, condition.embeds)
        lengths = None if condition.mask is None else condition.mask.sum(1).tolist()
        return qwen_image.prologue(self.transformer, latents, timestep, context, condition.mask, lengths, self._rotary)

    def call_block(self, block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        return qwen_image.call_block(block, streams)

    def mlps(self, block: nn.Module) -> Mapping[str, Mlp]:
        return qwen_image.mlps(block)

    def epilogue(self, streams: Streams) -> Tensor:
        return qwen_image.epilogue(self.transformer, streams)


def build_flux() -> FluxTransformer2DModel:
    """2 double and 12 single blocks of 192 channels; every modulation and the output start at zero."""
    torch.manual_seed(4)
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=12,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 20, 20),
    )
    _zero_modulations(transformer)
    return transformer


def build_qwen_image() -> QwenImageTransformer2DModel:
    """12 blocks of 192 channels; every modulation and the output start at zero."""
    torch.manual_seed(4)
    transformer = QwenImageTransformer2DModel(
        in_channels=32,
        out_channels=8,
        num_layers=12,
        attention_head_dim=48,
        num_attention_heads=4,
        joint_attention_dim=128,
        axes_dims_rope=(8, 20, 20),
    )
    _zero_modulations(transformer)
    return transformer


def _zero_modulations(transformer: nn.Module) -> None:
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or "_mod." in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
