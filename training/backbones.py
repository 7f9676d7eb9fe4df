"""What training needs to know of each family's transformer; the rest of the training code knows no family.

Times are noise levels: 1 is noise, 0 data, and velocities lead from data to noise.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Protocol

import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor, nn

from models.elastic.streams import Streams
from models.families.flux import adapter as flux
from models.families.hunyuan3d import plain_adapter
from models.families.hunyuan3d.plain_dit import HunYuanDiTPlain, MixtureOfExperts
from models.families.qwen_image import adapter as qwen_image
from models.families.wrapping import Mlp
from training.scenes.text import MAX_SEQUENCE_LENGTH, QWEN_SEQUENCE_LENGTH, Text

CELLS = 8
"""Image tokens a side of the pictures that are trained on."""


class Backbone(Protocol):
    """A transformer in its parts. `transformer` is the whole, `channels` its width.

    `has_guidance_embedding` says whether guidance is an input of the transformer, and so is distilled into it.
    """

    @property
    def transformer(self) -> nn.Module: ...
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

    def enter(self, index: int, streams: Streams) -> Streams:
        """What happens before the block of this number, whether it runs or not; `leave` after it."""
        ...

    def leave(self, index: int, streams: Streams) -> Streams: ...
    def mlps(self, block: nn.Module) -> Mapping[str, Mlp]: ...
    def epilogue(self, streams: Streams) -> Tensor: ...
    def compile_blocks(self) -> None: ...


class _WithoutLongSkips:
    """Of transformers where nothing passes a block but its streams."""

    transformer: FluxTransformer2DModel | QwenImageTransformer2DModel

    def enter(self, index: int, streams: Streams) -> Streams:
        return streams

    def leave(self, index: int, streams: Streams) -> Streams:
        return streams

    def compile_blocks(self) -> None:
        self.transformer.compile_repeated_blocks(dynamic=False)


class FluxBackbone(_WithoutLongSkips):
    has_guidance_embedding = True

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        self.transformer = transformer
        self.channels: int = flux.channels(transformer)
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

    def mlps(self, block: nn.Module) -> Mapping[str, Mlp]:
        return flux.mlps(block)

    def epilogue(self, streams: Streams) -> Tensor:
        return flux.epilogue(self.transformer, streams)


class QwenImageBackbone(_WithoutLongSkips):
    has_guidance_embedding = False

    def __init__(self, transformer: QwenImageTransformer2DModel) -> None:
        self.transformer = transformer
        self.channels: int = qwen_image.channels(transformer)
        self.blocks = qwen_image.blocks(transformer)

    @cached_property
    def _rotary(self) -> tuple[Tensor, Tensor]:
        return qwen_image.rotary_embedding(self.transformer, QWEN_SEQUENCE_LENGTH, CELLS, CELLS)

    def prologue(self, latents: Tensor, timestep: Tensor, guidance: Tensor, text: Text) -> Streams:
        context = qwen_image.embed_prompt(self.transformer, text.embeds)
        lengths = None if text.mask is None else text.mask.sum(1).tolist()
        return qwen_image.prologue(self.transformer, latents, timestep, context, text.mask, lengths, self._rotary)

    def call_block(self, block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        return qwen_image.call_block(block, streams)

    def mlps(self, block: nn.Module) -> Mapping[str, Mlp]:
        return qwen_image.mlps(block)

    def epilogue(self, streams: Streams) -> Tensor:
        return qwen_image.epilogue(self.transformer, streams)


class Hunyuan3DBackbone:
    """The 2.1 kind. Its own time runs the other way, so times and velocities are turned round here."""

    has_guidance_embedding = False

    def __init__(self, transformer: HunYuanDiTPlain) -> None:
        self.transformer = transformer
        self.channels = plain_adapter.channels(transformer)
        self.blocks = plain_adapter.blocks(transformer)
        for block in transformer.blocks:
            if block.has_experts:
                assert isinstance(block.moe, MixtureOfExperts)
                block.moe = EveryExpert(block.moe)
        places = range(len(self.blocks))
        self._enter_hooks = [plain_adapter.enter_hook(transformer, i) for i in places]
        self._leave_hooks = [plain_adapter.leave_hook(transformer, i) for i in places]

    def prologue(self, latents: Tensor, timestep: Tensor, guidance: Tensor, text: Text) -> Streams:
        return plain_adapter.prologue(self.transformer, latents, 1 - timestep, text.embeds)

    def call_block(self, block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        return plain_adapter.call_block(block, streams)

    def enter(self, index: int, streams: Streams) -> Streams:
        enter = self._enter_hooks[index]
        return enter(streams) if enter else streams

    def leave(self, index: int, streams: Streams) -> Streams:
        leave = self._leave_hooks[index]
        return leave(streams) if leave else streams

    def mlps(self, block: nn.Module) -> Mapping[str, Mlp]:
        return plain_adapter.mlps(block)

    def epilogue(self, streams: Streams) -> Tensor:
        return -plain_adapter.epilogue(self.transformer, streams)

    def compile_blocks(self) -> None:
        for block in self.transformer.blocks:
            block.compile(dynamic=False)


class EveryExpert(nn.Module):
    """A mixture that runs every expert on every token, in the names of `MixtureOfExperts`; its results are the same.

    Training narrows MLPs for each sample, so it has to know which sample a token is of, and one graph without a wait
    compiles.
    """

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.top_k = mixture.top_k
        self.gate = mixture.gate
        self.experts = mixture.experts
        self.shared_experts = mixture.shared_experts

    def forward(self, hidden_states: Tensor) -> Tensor:
        weights = self.gate(hidden_states).softmax(dim=-1)
        least = weights.topk(self.top_k, dim=-1).values[..., -1:]
        weights = weights.where(weights >= least, 0.0)
        result = self.shared_experts(hidden_states)
        for weight, expert in zip(weights.unbind(-1), self.experts, strict=True):
            result = result + weight[..., None] * expert(hidden_states)
        return result


HUNYUAN3D_PARAMS: dict[str, Any] = {
    "in_channels": 16,
    "hidden_size": 192,
    "context_dim": 192,
    "depth": 10,
    "num_heads": 6,
    "num_moe_layers": 2,
    "num_experts": 3,
    "moe_top_k": 2,
    "qkv_bias": False,
    "qk_norm": True,
}


def build_hunyuan3d() -> HunYuanDiTPlain:
    """10 blocks of 192 channels, 4 with long skips, 2 with experts; every branch and the output start at zero."""
    torch.manual_seed(4)
    transformer = HunYuanDiTPlain(**HUNYUAN3D_PARAMS)
    for name, module in transformer.named_modules():
        if name.endswith(("out_proj", "fc2", "net.2", "final_layer.linear")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith("skip_linear"):
            # Begin by passing the state on.
            nn.init.zeros_(module.bias)
            with torch.no_grad():
                module.weight /= 2
                module.weight[:, module.out_features :] += torch.eye(module.out_features)
    return transformer


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
