"""The transformer of tiny-hunyuan3d: the denoiser of Hunyuan3D-2.1 in small."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.elastic.streams import Streams
from models.families.hunyuan3d import plain_adapter
from models.families.hunyuan3d.plain_dit import HunYuanDiTPlain, MixtureOfExperts
from models.families.wrapping import Mlp
from training.lesson import Condition


class Hunyuan3DBackbone:
    """A `training.backbone.Backbone` of Hunyuan3D-2.1. Its own time runs from noise to data, so signs are flipped."""

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

    def prologue(self, latents: Tensor, timestep: Tensor, guidance: Tensor, condition: Condition) -> Streams:
        return plain_adapter.prologue(self.transformer, latents, 1 - timestep, condition.embeds)

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
    """A `MixtureOfExperts` that runs every expert on every token, with equal results and equal parameter names.

    Training narrows MLPs sample by sample, so each expert's input must keep the batch axis. One graph that never waits
    for the routing also compiles.
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
    """10 blocks of 192 channels, 4 with long skips, 2 with experts. Every branch and the output start at zero."""
    torch.manual_seed(4)
    transformer = HunYuanDiTPlain(**HUNYUAN3D_PARAMS)
    for name, module in transformer.named_modules():
        if name.endswith(("out_proj", "fc2", "net.2", "final_layer.linear")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith("skip_linear"):
            # At the start, pass the hidden states on.
            nn.init.zeros_(module.bias)
            with torch.no_grad():
                module.weight /= 2
                module.weight[:, module.out_features :] += torch.eye(module.out_features)
    return transformer
