"""Routers: from a block's input and the time embedding they compute a depth score and four width scores.

The form is the official one (Elastic-DiT at ce39f1d, `diffsynth/models/qwen_image_dit.py`; arXiv 2602.13993 section 3):
modulated LayerNorm, a linear trunk with ReLU on every token, the mean over tokens, two linear heads. The official
modulation has a third part, which is computed and thrown away; it is left out here.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic.plan import MLP_WIDTHS


@dataclass(frozen=True, slots=True)
class Scores:
    """`logits` `(batch, 5)`: one for depth, then one for each of MLP_WIDTHS."""

    logits: Tensor

    @property
    def depth_logits(self) -> Tensor:
        return self.logits[:, 0]

    @property
    def width_logits(self) -> Tensor:
        return self.logits[:, 1:]


Scorer = Callable[[Sequence[Tensor], Tensor, Sequence[Tensor | None]], Scores]
"""Scores a block's input, with the arguments of `Router.forward`: streams, modulation and masks."""


class Router(nn.Module):
    """The router of one block. `channels` is the block's width, `hidden` the trunk's (officially 128)."""

    def __init__(self, channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.img_mod = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))
        self.out = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.width_head = nn.Linear(hidden, len(MLP_WIDTHS))
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """As officially, gates start at 0.7, widths near full, and the modulation as the identity."""
        nn.init.zeros_(self.modulation_layer.weight)
        nn.init.zeros_(self.modulation_layer.bias)
        nn.init.kaiming_uniform_(self.trunk.weight, a=math.sqrt(5))
        nn.init.zeros_(self.trunk.bias)
        for head, bias in ((self.gate_head, [math.log(0.7 / 0.3)]), (self.width_head, [0.0, 0.0, 0.0, 2.0])):
            nn.init.normal_(head.weight, std=0.001)
            head.bias.copy_(torch.tensor(bias))

    @property
    def modulation_layer(self) -> nn.Linear:
        return cast(nn.Linear, self.img_mod[1])

    @property
    def trunk(self) -> nn.Linear:
        return cast(nn.Linear, self.out[0])

    @property
    def gate_head(self) -> nn.Linear:
        return cast(nn.Linear, self.out[2])

    def modulation(self, temb: Tensor) -> Tensor:
        """Shift and scale `(batch, 2 * channels)` from `temb` `(batch, channels)`."""
        result: Tensor = self.img_mod(temb)
        return result

    def forward(self, streams: Sequence[Tensor], modulation: Tensor, masks: Sequence[Tensor | None]) -> Scores:
        """Score a block's input.

        `streams` are `(batch, tokens, channels)` each, such as text and image. `masks` `(batch, tokens)` are true for
        real tokens, None where all are real. Padding never counts.
        """
        mean = _mean_of_trunk(self.trunk.weight, self.trunk.bias, streams, modulation, masks)
        return Scores(torch.cat((self.gate_head(mean), self.width_head(mean)), dim=1))

    def fused(self) -> "FusedRouter":
        """The router for inference. This router's heads become views of one joint layer."""
        heads = _as_one_layer([self.gate_head, self.width_head])
        return FusedRouter(self.trunk.weight, self.trunk.bias, heads.weight, heads.bias)


@dataclass(frozen=True, slots=True)
class FusedRouter:
    """A router without modules and with one joint head. At small sizes a third of its time went into module calls."""

    trunk_weight: Tensor
    trunk_bias: Tensor
    heads_weight: Tensor
    heads_bias: Tensor

    def __call__(self, streams: Sequence[Tensor], modulation: Tensor, masks: Sequence[Tensor | None]) -> Scores:
        mean = _mean_of_trunk(self.trunk_weight, self.trunk_bias, streams, modulation, masks)
        return Scores(F.linear(mean, self.heads_weight, self.heads_bias))


def _mean_of_trunk(
    weight: Tensor, bias: Tensor, streams: Sequence[Tensor], modulation: Tensor, masks: Sequence[Tensor | None]
) -> Tensor:
    """The trunk's mean output over real tokens, `(batch, hidden)`, for the arguments of `Router.forward`.

    Cheaper than the official form in two ways, and equal to it up to rounding. The modulation is applied to the trunk's
    weights instead of to every token. The heads are linear, so they are applied to the mean instead of to every token.
    """
    shift, scale = modulation.chunk(2, dim=1)
    entering = streams[0] if len(streams) == 1 else torch.cat(tuple(streams), dim=1)
    tokens = F.layer_norm(entering, entering.shape[-1:], eps=1e-6)
    modulated = torch.addcmul(weight, weight, scale[:, None])
    hidden = torch.baddbmm(F.linear(shift, weight, bias)[:, None], tokens, modulated.mT).relu_()
    return hidden.mean(1) if all(mask is None for mask in masks) else _masked_mean(hidden, streams, masks)


def _masked_mean(hidden: Tensor, streams: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Tensor:
    """Mean over real tokens, `(batch, channels)`, of `hidden` `(batch, tokens of all streams, channels)`."""
    whole = [
        stream.new_ones(stream.shape[:2]) if mask is None else mask.to(stream.dtype)
        for stream, mask in zip(streams, masks, strict=True)
    ]
    mask = torch.cat(whole, dim=1)
    # Counted in float32: bfloat16 cannot distinguish 4396 tokens from 4384.
    count = mask.sum(1, keepdim=True, dtype=torch.float32)
    return ((hidden * mask[..., None]).sum(1, dtype=torch.float32) / count).to(hidden.dtype)


class RouterStack(nn.Module):
    """One router for each block, in the order of the blocks."""

    def __init__(self, num_blocks: int, channels: int, hidden: int = 128) -> None:
        super().__init__()
        self.gate_mlps = nn.ModuleList(Router(channels, hidden) for _ in range(num_blocks))

    @property
    def routers(self) -> list[Router]:
        return [cast(Router, router) for router in self.gate_mlps]

    def fused_modulation(self) -> nn.Linear:
        """One layer that computes all blocks' modulations, joined in order, from SiLU of the time embedding.

        Modulations depend on the time embedding alone, so a step computes them all at once. The routers' own layers
        become views of this layer: at the published size they take 2 GB, which is then not needed twice.
        """
        return _as_one_layer([router.modulation_layer for router in self.routers])


def _as_one_layer(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One layer with the outputs of all `layers`, joined in order. The layers become views of it.

    Its weights are stored with the inputs as rows: for few rows of input, a CPU then reads each weight once and in
    order.
    """
    fused = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), device="meta")
    weight = torch.cat([layer.weight.detach().mT for layer in layers], dim=1).mT
    bias = torch.cat([layer.bias.detach() for layer in layers])
    sizes = [layer.out_features for layer in layers]
    for layer, *parts in zip((fused, *layers), (weight, *weight.split(sizes)), (bias, *bias.split(sizes)), strict=True):
        layer.weight, layer.bias = (nn.Parameter(part, requires_grad=False) for part in parts)
    return fused
