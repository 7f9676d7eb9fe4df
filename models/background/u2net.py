"""U²-Net-p, which finds the salient object of an image (Qin et al. 2020, https://arxiv.org/abs/2005.09007).

The small network of figure 5: six encoder and five decoder stages, each a small U-Net itself (figure 2d, "RSU"). The
published weights have their batch norms folded into the convolutions, so there are none here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MIDDLE, _OUT = 16, 64
"""Channels inside and at the end of every stage of the small network (table 1)."""


class ConvRelu(nn.Conv2d):
    """A 3x3 convolution and ReLU that keep height and width."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, padding=dilation, dilation=dilation)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return F.relu(super().forward(hidden_states))


class RSU(nn.Module):
    """A residual U-block of `height` levels: `(batch, in_channels, height, width)` to `_OUT` channels.

    `is_dilated` is the paper's RSU-4F, which widens the view by dilation instead of pooling.
    """

    def __init__(self, in_channels: int, height: int, is_dilated: bool = False) -> None:
        super().__init__()
        dilations = [2**level if is_dilated else 1 for level in range(height - 1)]
        self.is_pooled = not is_dilated
        self.input = ConvRelu(in_channels, _OUT)
        channels = (_OUT, *(height - 1) * (_MIDDLE,))
        self.encoder = nn.ModuleList(map(ConvRelu, channels, channels[1:], dilations))
        self.bottom = ConvRelu(_MIDDLE, _MIDDLE, 2 * dilations[-1] if is_dilated else 2)
        outputs = (_OUT, *(height - 2) * (_MIDDLE,))
        self.decoder = nn.ModuleList(
            ConvRelu(2 * _MIDDLE, outputs[level], dilations[level]) for level in reversed(range(height - 1))
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        entered = self.input(hidden_states)
        levels: list[Tensor] = []
        below = entered
        for number, conv in enumerate(self.encoder):
            below = conv(_pool(below) if self.is_pooled and number else below)
            levels.append(below)
        below = self.bottom(below)
        for conv, level in zip(self.decoder, reversed(levels), strict=True):
            below = conv(torch.cat((_resized(below, level), level), dim=1))
        block: Tensor = below + entered
        return block


class U2NetP(nn.Module):
    """Takes normalised colours `(batch, 3, height, width)`, returns probabilities `(batch, height, width)`."""

    def __init__(self) -> None:
        super().__init__()
        heights: Sequence[int] = (7, 6, 5, 4, 4, 4)
        self.encoder = nn.ModuleList(
            RSU(_OUT if number else 3, height, is_dilated=number > 3) for number, height in enumerate(heights)
        )
        self.decoder = nn.ModuleList(
            RSU(2 * _OUT, heights[number], is_dilated=number > 3) for number in reversed(range(5))
        )
        self.side = nn.ModuleList(nn.Conv2d(_OUT, 1, 3, padding=1) for _ in heights)
        self.fusion = nn.Conv2d(len(heights), 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        levels: list[Tensor] = []
        hidden_states = pixels
        for number, stage in enumerate(self.encoder):
            hidden_states = stage(_pool(hidden_states) if number else hidden_states)
            levels.append(hidden_states)
        decoded = [levels.pop()]
        for stage in self.decoder:
            level = levels.pop()
            decoded.append(stage(torch.cat((_resized(decoded[-1], level), level), dim=1)))
        logits = [_resized(conv(level), pixels) for conv, level in zip(self.side, reversed(decoded), strict=True)]
        probabilities: Tensor = self.fusion(torch.cat(logits, dim=1)).sigmoid()[:, 0]
        return probabilities


def _pool(hidden_states: Tensor) -> Tensor:
    return F.max_pool2d(hidden_states, 2, stride=2, ceil_mode=True)


def _resized(hidden_states: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the height and width of `like`."""
    if hidden_states.shape[-2:] == like.shape[-2:]:
        return hidden_states
    return F.interpolate(hidden_states, like.shape[-2:], mode="bilinear")
