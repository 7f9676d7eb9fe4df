"""Hunyuan3D's image encoder: DINOv2, under the names of the public checkpoints.

Oquab et al. 2023, "DINOv2", https://arxiv.org/abs/2304.07193. The checkpoints use the tensor names of transformers 4.
The class of transformers 5 cannot load them: it has other names and splits the gated feed-forward differently.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Dinov2Config
from transformers.activations import ACT2FN

from models.errors import WeightsError

# Of ImageNet's red, green and blue in [0, 1], with which DINOv2 was trained.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


def image_tensor(pixels: np.ndarray) -> Tensor:
    """The encoder's input `(1, 3, height, width)` float32 in [-1, 1], from `(height, width, 3)` uint8."""
    return torch.from_numpy(pixels.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None].contiguous()


class SingleImageEncoder(nn.Module):
    """A checkpoint's conditioner. `main_image_encoder` is as in its `config.yaml`: `type` and `kwargs`.

    Under classifier-free guidance, zeros stand for no image; no encoder makes them.
    Raises WeightsError for an unknown type of encoder.
    """

    def __init__(self, *, main_image_encoder: Mapping[str, Any]) -> None:
        super().__init__()
        kind, kwargs = main_image_encoder["type"], main_image_encoder["kwargs"]
        if kind not in _ENCODERS:
            raise WeightsError(f"main_image_encoder is of type {kind}; known: {', '.join(_ENCODERS)}")
        self.main_image_encoder = _ENCODERS[kind](
            config=kwargs["config"], image_size=kwargs["image_size"], use_cls_token=kwargs.get("use_cls_token", True)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens of one image."""
        return int(self.main_image_encoder.num_tokens)

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return int(self.main_image_encoder.model.layernorm.normalized_shape[0])

    def forward(self, image: Tensor) -> Tensor:
        """Image tokens `(batch, tokens, channels)` of a square `image` `(batch, 3, side, side)` in [-1, 1]."""
        return self.main_image_encoder(image)


class DinoImageEncoder(nn.Module):
    """`config` is transformers' Dinov2Config, `image_size` the side in pixels of DINOv2's input."""

    def __init__(self, *, config: Mapping[str, Any], image_size: int, use_cls_token: bool) -> None:
        super().__init__()
        self._side = image_size
        self._use_cls_token = use_cls_token
        self.model = Dinov2Model(Dinov2Config(**config))
        self.num_tokens = (image_size // self.model.patch_size) ** 2 + use_cls_token

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.model(self.pixel_values(image))
        return tokens if self._use_cls_token else tokens[:, 1:]

    def pixel_values(self, image: Tensor) -> Tensor:
        """DINOv2's input, `(batch, 3, image_size, image_size)`, float32."""
        pixels = (image.float() + 1) / 2
        pixels = F.interpolate(pixels, (self._side, self._side), mode="bilinear", antialias=True)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return (pixels - mean) / std


class DinoImageEncoderMV(DinoImageEncoder):
    """Encodes views of one object, in the order front, left, back, right; later views may be missing.

    Takes `(batch, views, 3, side, side)`, or `(batch, 3, side, side)` for the front alone. The tokens of the views are
    joined in order.
    """

    def forward(self, image: Tensor) -> Tensor:
        views = image if image.ndim == 5 else image[:, None]
        tokens = super().forward(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        directions = get_timestep_embedding(
            torch.arange(views.shape[1], device=tokens.device), tokens.shape[-1], downscale_freq_shift=0
        )
        return (tokens + directions[:, None].to(tokens.dtype)).flatten(1, 2)


_ENCODERS = {"DinoImageEncoder": DinoImageEncoder, "DinoImageEncoderMV": DinoImageEncoderMV}


class Dinov2Model(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """All tokens `(batch, 1 + patches, channels)`, normalised, the class token first."""
        return self.layernorm(self.encoder(self.embeddings(pixel_values)))


class Embeddings(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self._grid = config.image_size // config.patch_size
        channels, patch = config.hidden_size, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.mask_token = nn.Parameter(torch.zeros(1, channels))  # in checkpoints, but used only in DINOv2's training
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(config.num_channels, channels, patch, patch)})
        self.position_embeddings = nn.Parameter(torch.zeros(1, self._grid**2 + 1, channels))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embeddings["projection"](pixel_values.to(self.cls_token.dtype))
        tokens = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches.flatten(2).mT), dim=1)
        return tokens + self._positions(patches.shape[-2:])

    def _positions(self, grid: torch.Size) -> Tensor:
        """Position embeddings, interpolated where the grid of patches differs from that of DINOv2's training."""
        if tuple(grid) == (self._grid, self._grid):
            return self.position_embeddings
        of_class, of_patches = self.position_embeddings.split([1, self._grid**2], dim=1)
        table = of_patches.mT.unflatten(-1, (self._grid, self._grid)).float()
        resized = F.interpolate(table, tuple(grid), mode="bicubic").to(of_patches.dtype)
        return torch.cat((of_class, resized.flatten(2).mT), dim=1)


class Encoder(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states)
        return hidden_states


class Layer(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        channels, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(channels, eps)
        self.attention = Attention(channels, config.num_attention_heads, config.qkv_bias)
        self.layer_scale1 = LayerScale(channels)
        self.norm2 = nn.LayerNorm(channels, eps)
        self.mlp = SwiGLU(config) if config.use_swiglu_ffn else FeedForward(config)
        self.layer_scale2 = LayerScale(channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.layer_scale1(self.attention(self.norm1(hidden_states)))
        return hidden_states + self.layer_scale2(self.mlp(self.norm2(hidden_states)))


class Attention(nn.Module):
    def __init__(self, channels: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.attention = nn.ModuleDict(
            {name: nn.Linear(channels, channels, bias=qkv_bias) for name in ("query", "key", "value")}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(channels, channels)})

    def forward(self, hidden_states: Tensor) -> Tensor:
        query, key, value = (
            self.attention[name](hidden_states).unflatten(-1, (self._num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        heads = F.scaled_dot_product_attention(query, key, value)
        return self.output["dense"](heads.transpose(1, 2).flatten(-2))


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(channels))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states * self.lambda1


class FeedForward(nn.Module):
    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        width = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class SwiGLU(nn.Module):
    """DINOv2-giant's gated feed-forward. Its width is 2/3 of the plain one's, rounded up to a multiple of 8."""

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        width = (int(int(config.hidden_size * config.mlp_ratio) * 2 / 3) + 7) // 8 * 8
        self.weights_in = nn.Linear(config.hidden_size, 2 * width)
        self.weights_out = nn.Linear(width, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, value = self.weights_in(hidden_states).chunk(2, dim=-1)
        return self.weights_out(F.silu(gate) * value)
