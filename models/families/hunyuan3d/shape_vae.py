"""Hunyuan3D's shape VAE: encodes points on a surface as a set of latents, and decodes these to a scalar field.

Rebuilt, with the published names of tensors, after Hunyuan3D-2.1 at 5e3ec6d (`hy3dshape/models/autoencoders`). 2.0 uses
the same network. Latents have no order: permuting them permutes their decoded tokens and leaves the field unchanged.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import WeightsError

DecodedField = Callable[[Tensor], Tensor]
"""Maps points `(batch, points, 3)` to logits `(batch, points)`; for one shape also `(points, 3)` to `(points,)`."""

# In all norms except `ln_post`, which has torch's 1e-5.
_EPS = 1e-6


class ShapeVAE(nn.Module):
    """Arguments are the `params` of a public `config.yaml`, with the reference's defaults.

    `with_encoder=False` leaves out `encoder` and `pre_kl`, which most files of 2.0 lack. Latents here are the
    denoiser's latents divided by `scale_factor`; callers do the division.
    """

    def __init__(
        self,
        *,
        num_latents: int,
        embed_dim: int,
        width: int,
        heads: int,
        num_decoder_layers: int,
        num_encoder_layers: int = 8,
        num_freqs: int = 8,
        include_pi: bool = True,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        point_feats: int = 3,
        geo_decoder_mlp_expand_ratio: int = 4,
        geo_decoder_downsample_ratio: int = 1,
        geo_decoder_ln_post: bool = True,
        scale_factor: float = 1.0,
        with_encoder: bool = True,
    ) -> None:
        super().__init__()
        self.num_latents = num_latents
        self.embed_dim = embed_dim
        self.scale_factor = scale_factor
        self._fourier = partial(fourier_features, num_freqs=num_freqs, include_pi=include_pi)
        point_channels = 3 * (1 + 2 * num_freqs)
        self.encoder: Encoder | None = None
        if with_encoder:
            self.encoder = Encoder(point_channels + point_feats, width, heads, num_encoder_layers, qkv_bias, qk_norm)
            self.pre_kl = nn.Linear(width, 2 * embed_dim)
        self.geo_width = width // geo_decoder_downsample_ratio
        self.post_kl = nn.Linear(embed_dim, width)
        self.transformer = Transformer(width, heads, num_decoder_layers, qkv_bias, qk_norm)
        self.geo_decoder = GeometryDecoder(
            point_channels,
            width,
            heads,
            qkv_bias,
            qk_norm,
            geo_decoder_mlp_expand_ratio,
            geo_decoder_downsample_ratio,
            geo_decoder_ln_post,
        )

    def features(self, surface: Tensor) -> Tensor:
        """The features of points on a surface that `encode` takes: `(batch, points, features)`, float32.

        `surface` is `(batch, points, 3 + point_feats)`: a place in [-1, 1]^3, then, as published, the outward unit
        normal and a flag that is 1 for points from a sharp edge, else 0.
        """
        places, attributes = surface.float().split([3, surface.shape[-1] - 3], dim=-1)
        return torch.cat([self._fourier(places), attributes], dim=-1)

    def encode(self, query_features: Tensor, data_features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of latents, each `(batch, queries, embed_dim)`.

        Both arguments are `(batch, points, features)`. The data are all points, 20 for each latent as published; the
        queries are `num_latents` of these points, spread evenly. Raises WeightsError if this VAE has no encoder.
        """
        if self.encoder is None:
            raise WeightsError("this shape VAE has no encoder, so it cannot make latents of a surface")
        mean, logvar = self.pre_kl(self.encoder(query_features, data_features)).chunk(2, dim=-1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents `(batch, tokens, embed_dim)` to tokens `(batch, tokens, width)`, of which `field` is read."""
        return self.transformer(self.post_kl(latents.to(self.post_kl.weight.dtype)))

    def field(self, latents: Tensor) -> DecodedField:
        """The field of each shape of `latents` `(batch, tokens, embed_dim)`: positive inside, 0 on the surface.

        Points lie in the cube of half side 1.01; points and logits are float32. Points do not interact, so a caller may
        ask in chunks: everything that depends on the latents alone is computed here, once. A call holds about ten times
        `width` numbers a point. On a CPU it is fastest with one or two thousand points, which fit in the caches.
        """
        keys, values = self.geo_decoder.keys_and_values(self.decode(latents))

        def field(points: Tensor) -> Tensor:
            batched = points.reshape(-1, *points.shape[-2:])
            logits = self.geo_decoder(self._fourier(batched), keys, values)
            return logits.reshape(points.shape[:-1])

        return field


def geometry_of(tensors: Mapping[str, Tensor]) -> dict[str, int | bool]:
    """The arguments of ShapeVAE that its tensors determine: an encoder or none, the geometry decoder's sizes.

    Turbo VAEs have a geometry decoder of half the width, with a smaller MLP and fewer norms. Names are those of
    ShapeVAE's state dict. Raises WeightsError if a tensor is missing that this needs.
    """
    try:
        width = tensors["post_kl.weight"].shape[0]
        geo_width = tensors["geo_decoder.output_proj.weight"].shape[1]
        mlp_width = tensors["geo_decoder.cross_attn_decoder.mlp.c_fc.weight"].shape[0]
    except KeyError as error:
        raise WeightsError(f"these are not the tensors of a shape VAE: {error.args[0]} is missing") from error
    return {
        "geo_decoder_mlp_expand_ratio": mlp_width // geo_width,
        "geo_decoder_downsample_ratio": width // geo_width,
        "geo_decoder_ln_post": "geo_decoder.ln_post.weight" in tensors,
        "with_encoder": "pre_kl.weight" in tensors,
    }


def fourier_features(points: Tensor, num_freqs: int, include_pi: bool) -> Tensor:
    """Places `(..., 3)`, their sines and cosines, axis by axis: `(..., 3 + 6 * num_freqs)`.

    Always float32. In half precision, rounding a place near the cube's faces would shift the phase at the highest of
    the published 8 frequencies, 128, by 0.06.
    """
    points = points.float()
    frequencies = torch.exp2(torch.arange(num_freqs, device=points.device, dtype=torch.float32))
    if include_pi:
        frequencies = frequencies * math.pi
    angles = (points[..., None] * frequencies).flatten(-2)
    return torch.cat([points, angles.sin(), angles.cos()], dim=-1)


class Encoder(nn.Module):
    def __init__(
        self, in_channels: int, width: int, heads: int, num_layers: int, qkv_bias: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.input_proj = nn.Linear(in_channels, width)
        self.cross_attn = CrossBlock(width, heads, qkv_bias, qk_norm, mlp_ratio=4)
        self.self_attn = Transformer(width, heads, num_layers, qkv_bias, qk_norm)
        self.ln_post = nn.LayerNorm(width)

    def forward(self, query_features: Tensor, data_features: Tensor) -> Tensor:
        dtype = self.input_proj.weight.dtype
        data = self.input_proj(data_features.to(dtype))
        hidden_states = self.input_proj(query_features.to(dtype))
        hidden_states = self.cross_attn(hidden_states, *self.cross_attn.keys_and_values(data))
        return self.ln_post(self.self_attn(hidden_states))


class GeometryDecoder(nn.Module):
    """Reads the field at points. `keys_and_values` is the part that does not depend on the points."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        heads: int,
        qkv_bias: bool,
        qk_norm: bool,
        mlp_ratio: int,
        downsample_ratio: int,
        ln_post: bool,
    ) -> None:
        super().__init__()
        geo_width = width // downsample_ratio
        self.query_proj = nn.Linear(in_channels, geo_width)
        self.latents_proj = nn.Identity() if downsample_ratio == 1 else nn.Linear(width, geo_width)
        # Files without `ln_post` have no norms of queries and keys here either.
        self.cross_attn_decoder = CrossBlock(
            geo_width, heads // downsample_ratio, qkv_bias, qk_norm and ln_post, mlp_ratio
        )
        self.ln_post = nn.LayerNorm(geo_width) if ln_post else nn.Identity()
        self.output_proj = nn.Linear(geo_width, 1)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Each `(batch, heads, tokens, channels of a head)`, of `context` `(batch, tokens, width)`."""
        keys, values = self.cross_attn_decoder.keys_and_values(self.latents_proj(context))
        # Contiguous, since every chunk of points reads them.
        return keys.contiguous(), values.contiguous()

    def forward(self, features: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Logits `(batch, points)`, float32, of points with `features` `(batch, points, features)`."""
        hidden_states = self.query_proj(features.to(self.query_proj.weight.dtype))
        hidden_states = self.cross_attn_decoder(hidden_states, keys, values)
        return self.output_proj(self.ln_post(hidden_states))[..., 0].float()


class Transformer(nn.Module):
    """Blocks of self-attention, without a norm after the last."""

    def __init__(self, width: int, heads: int, num_layers: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(SelfBlock(width, heads, qkv_bias, qk_norm) for _ in range(num_layers)))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.resblocks(hidden_states)


class SelfBlock(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, _EPS)
        self.attn = SelfAttention(width, heads, qkv_bias, qk_norm)
        self.ln_2 = nn.LayerNorm(width, _EPS)
        self.mlp = FeedForward(width, mlp_ratio=4)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states))
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class CrossBlock(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool, qk_norm: bool, mlp_ratio: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, _EPS)
        self.ln_2 = nn.LayerNorm(width, _EPS)
        self.attn = CrossAttention(width, heads, qkv_bias, qk_norm)
        self.ln_3 = nn.LayerNorm(width, _EPS)
        self.mlp = FeedForward(width, mlp_ratio)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.attn.keys_and_values(self.ln_2(context))

    def forward(self, hidden_states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), keys, values)
        return hidden_states + self.mlp(self.ln_3(hidden_states))


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self._heads = heads
        self.c_qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = HeadNorms(width // heads, qk_norm)

    def forward(self, hidden_states: Tensor) -> Tensor:
        # A head's query, key and value lie side by side.
        queries, keys, values = self.c_qkv(hidden_states).unflatten(-1, (self._heads, -1)).chunk(3, dim=-1)
        queries, keys = self.attention.q_norm(queries), self.attention.k_norm(keys)
        return self.c_proj(_attend(queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self._heads = heads
        self.c_q = nn.Linear(width, width, bias=qkv_bias)
        self.c_kv = nn.Linear(width, 2 * width, bias=qkv_bias)
        self.c_proj = nn.Linear(width, width)
        self.attention = HeadNorms(width // heads, qk_norm)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        # A head's key and value lie side by side.
        keys, values = self.c_kv(context).unflatten(-1, (self._heads, -1)).chunk(2, dim=-1)
        return self.attention.k_norm(keys).transpose(1, 2), values.transpose(1, 2)

    def forward(self, hidden_states: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries = self.attention.q_norm(self.c_q(hidden_states).unflatten(-1, (self._heads, -1)))
        return self.c_proj(_attend(queries.transpose(1, 2), keys, values))


class HeadNorms(nn.Module):
    """Norms of each head's queries and keys: layer norms, where the denoisers have RMS norms."""

    def __init__(self, channels: int, qk_norm: bool) -> None:
        super().__init__()
        self.q_norm = nn.LayerNorm(channels, _EPS) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(channels, _EPS) if qk_norm else nn.Identity()


class FeedForward(nn.Module):
    def __init__(self, width: int, mlp_ratio: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, mlp_ratio * width)
        self.c_proj = nn.Linear(mlp_ratio * width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(hidden_states)))


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """`(batch, queries, width)` of `(batch, heads, tokens, channels of a head)`, the heads joined in order."""
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(-2)
