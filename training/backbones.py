"""What training needs to know of each family's transformer; the rest of the training code knows no family."""

from collections.abc import Mapping
from functools import cached_property
from typing import Protocol

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor, nn

from models.elastic.runner import Streams
from models.families.flux import adapter as flux
from models.families.qwen_image import adapter as qwen_image
from training.text import MAX_SEQUENCE_LENGTH, QWEN_SEQUENCE_LENGTH, Text

CELLS = 8
"""Image tokens a side of the pictures that are trained on."""


class Backbone(Protocol):
    """A transformer in its parts. `transformer` is the whole, `channels` its width.

    `has_guidance_embedding` says whether guidance is an input of the transformer, and so is distilled into it.
    """

    @property
    def transformer(self) -> FluxTransformer2DModel | QwenImageTransformer2DModel: ...
    @property
    def channels(self) -> int: ...
    @property
    def has_guidance_embedding(self) -> bool: ...
    @property
    def blocks(self) -> Mapping[str, nn.Module]: ...

    def prologue(self, latents: Tensor, timestep: Tensor, guidance: Tensor, text: Text) -> Streams:
        """Streams into the first block: latents `(batch, 64, channels)`, `timestep` and `guidance` `(batch,)`."""
        ...

    def call_block(self, block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        """The text stream, then the image stream."""
        ...

    def mlp_layers(self, block: nn.Module) -> tuple[nn.Linear, nn.Linear, int]: ...
    def epilogue(self, streams: Streams) -> Tensor: ...


class FluxBackbone:
    has_guidance_embedding = True

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        self.transformer = transformer
        self.channels: int = transformer.inner_dim
        self.blocks = flux.blocks(transformer)

    @cached_property
    def _rotary(self) -> tuple[Tensor, Tensor]:
        return flux.rotary_embedding(self.transformer, MAX_SEQUENCE_LENGTH, CELLS, CELLS)

    def prologue(self, latents: Tensor, timestep: Tensor, guidance: Tensor, text: Text) -> Streams:
        assert text.pooled is not None
        context = self.transformer.context_embedder(text.embeds)
        return flux.prologue(self.transformer, latents, timestep, guidance, context, text.pooled, self._rotary)

    def call_block(self, block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        return flux.call_block(block, streams)

    def mlp_layers(self, block: nn.Module) -> tuple[nn.Linear, nn.Linear, int]:
        return flux.mlp_layers(block)

    def epilogue(self, streams: Streams) -> Tensor:
        return flux.epilogue(self.transformer, streams)


class QwenImageBackbone:
    has_guidance_embedding = False

    def __init__(self, transformer: QwenImageTransformer2DModel) -> None:
        self.transformer = transformer
        self.channels: int = transformer.inner_dim
        self.blocks = qwen_image.blocks(transformer)

    @cached_property
    def _rotary(self) -> tuple[Tensor, Tensor]:
        return qwen_image.rotary_embedding(self.transformer, QWEN_SEQUENCE_LENGTH, CELLS, CELLS)

    def prologue(self, latents: Tensor, timestep: Tensor, guidance: Tensor, text: Text) -> Streams:
        context = qwen_image.embed_prompt(self.transformer, text.embeds)
        return qwen_image.prologue(self.transformer, latents, timestep, context, text.mask, self._rotary)

    def call_block(self, block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        return qwen_image.call_block(block, streams)

    def mlp_layers(self, block: nn.Module) -> tuple[nn.Linear, nn.Linear, int]:
        return qwen_image.mlp_layers(block)

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
