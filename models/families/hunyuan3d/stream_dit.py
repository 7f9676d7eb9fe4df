"""Hunyuan3D-2.0's denoiser: FLUX's double and single stream blocks, under the names of the public checkpoints.

Sizes and order of operations are those of Tencent-Hunyuan/Hunyuan3D-2 at 9bcf302, `hy3dgen/shapegen`. No token has a
position, so there are no rotary embeddings. In tensor names `img` is the shape's stream and `txt` the image's; here
they are `hidden_states` and `encoder_hidden_states`.
"""

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import WeightsError

_EPS = 1e-6

_NUM_FEATURES = 256


def scalar_features(scalar: Tensor, max_period: int) -> Tensor:
    """Cosines, then sines of 1000 times `scalar` `(batch,)`: `(batch, 256)`, float32."""
    features: Tensor = get_timestep_embedding(
        1000 * scalar.float(), _NUM_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0, max_period=max_period
    )
    return features


class ScalarEmbedder(nn.Module):
    """Embeds a time or a guidance scale, `(batch,)`, as `(batch, channels)`."""

    def __init__(self, channels: int, max_period: int) -> None:
        super().__init__()
        self.max_period = max_period
        self.in_layer = nn.Linear(_NUM_FEATURES, channels)
        self.out_layer = nn.Linear(channels, channels)

    def forward(self, scalar: Tensor) -> Tensor:
        features = scalar_features(scalar, self.max_period).to(self.in_layer.weight.dtype)
        return self.out_layer(F.silu(self.in_layer(features)))


class Modulation(nn.Module):
    """`num_parts` vectors of modulation, `(batch, 1, channels)` each."""

    def __init__(self, channels: int, num_parts: int) -> None:
        super().__init__()
        self.num_parts = num_parts
        self.lin = nn.Linear(channels, num_parts * channels)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(temb))[:, None].chunk(self.num_parts, dim=-1)


class HeadNorm(nn.Module):
    """RMS norm of every head's channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, heads: Tensor) -> Tensor:
        # Under autocast the scale has another type than the heads, for which torch has no fast kernel.
        return F.rms_norm(heads, self.scale.shape, self.scale.to(heads.dtype), _EPS)


class QKNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query_norm = HeadNorm(channels)
        self.key_norm = HeadNorm(channels)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value `(batch, heads, tokens, head channels)` out of `(batch, tokens, 3 * channels)`."""
        heads = qkv.unflatten(-1, (3, -1, len(self.query_norm.scale))).transpose(1, 3)
        query, key, value = heads.unbind(2)
        return self.query_norm(query), self.key_norm(key), value


class StreamAttention(nn.Module):
    """One stream's share of a double block's attention: what goes into it, and `proj` of what comes out."""

    def __init__(self, channels: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.norm = QKNorm(channels // num_heads)
        self.proj = nn.Linear(channels, channels)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.norm(self.qkv(hidden_states))


class DoubleStreamBlock(nn.Module):
    def __init__(self, channels: int, num_heads: int, mlp_channels: int, qkv_bias: bool) -> None:
        super().__init__()
        self.img_mod = Modulation(channels, 6)
        self.img_attn = StreamAttention(channels, num_heads, qkv_bias)
        self.img_mlp = _mlp(channels, mlp_channels)
        self.txt_mod = Modulation(channels, 6)
        self.txt_attn = StreamAttention(channels, num_heads, qkv_bias)
        self.txt_mlp = _mlp(channels, mlp_channels)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the image's stream, then the shape's."""
        shift1, scale1, gate1, *feed_forward = self.img_mod(temb)
        txt_shift1, txt_scale1, txt_gate1, *txt_feed_forward = self.txt_mod(temb)
        img_qkv = self.img_attn(_modulated(hidden_states, shift1, scale1))
        txt_qkv = self.txt_attn(_modulated(encoder_hidden_states, txt_shift1, txt_scale1))
        joint = _attend(*(torch.cat(parts, dim=2) for parts in zip(txt_qkv, img_qkv, strict=True)))
        txt, img = joint.split((encoder_hidden_states.shape[1], hidden_states.shape[1]), dim=1)
        hidden_states = hidden_states + gate1 * self.img_attn.proj(img)
        encoder_hidden_states = encoder_hidden_states + txt_gate1 * self.txt_attn.proj(txt)
        shift2, scale2, gate2 = feed_forward
        hidden_states = hidden_states + gate2 * self.img_mlp(_modulated(hidden_states, shift2, scale2))
        shift2, scale2, gate2 = txt_feed_forward
        encoder_hidden_states = encoder_hidden_states + gate2 * self.txt_mlp(
            _modulated(encoder_hidden_states, shift2, scale2)
        )
        return encoder_hidden_states, hidden_states


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side, on both streams as one.

    `linear1` has the rows of queries, keys and values, then those of the MLP; `linear2` the columns of the attention,
    then those of the MLP. Both may be cut to fewer hidden neurons of the MLP.
    """

    def __init__(self, channels: int, num_heads: int, mlp_channels: int) -> None:
        super().__init__()
        self.modulation = Modulation(channels, 3)
        self.linear1 = nn.Linear(channels, 3 * channels + mlp_channels)
        self.linear2 = nn.Linear(channels + mlp_channels, channels)
        self.norm = QKNorm(channels // num_heads)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the image's stream, then the shape's."""
        joint = torch.cat((encoder_hidden_states, hidden_states), dim=1)
        shift, scale, gate = self.modulation(temb)
        qkv_channels = 3 * joint.shape[-1]
        qkv, mlp = self.linear1(_modulated(joint, shift, scale)).tensor_split((qkv_channels,), dim=-1)
        attended = _attend(*self.norm(qkv))
        joint = joint + gate * self.linear2(torch.cat((attended, F.gelu(mlp, approximate="tanh")), dim=-1))
        num_image_tokens = encoder_hidden_states.shape[1]
        return joint[:, :num_image_tokens], joint[:, num_image_tokens:]


class FinalLayer(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 2 * channels))

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Returns the velocity `(batch, tokens, latent channels)`."""
        shift, scale = self.adaLN_modulation(temb)[:, None].chunk(2, dim=-1)
        return self.linear(_modulated(hidden_states, shift, scale))


class Hunyuan3DDiT(nn.Module):
    """The whole model. Arguments are named as in a checkpoint's `config.yaml`.

    `time_factor` is the longest period of the embedded scalars, whatever its name says: checkpoints were trained so.
    Raises WeightsError where the heads don't divide the channels.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        context_in_dim: int,
        hidden_size: int,
        mlp_ratio: float,
        num_heads: int,
        depth: int,
        depth_single_blocks: int,
        qkv_bias: bool,
        time_factor: int = 1000,
        guidance_embed: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise WeightsError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        mlp_channels = int(hidden_size * mlp_ratio)
        self.latent_in = nn.Linear(in_channels, hidden_size)
        self.cond_in = nn.Linear(context_in_dim, hidden_size)
        self.time_in = ScalarEmbedder(hidden_size, time_factor)
        self.guidance_in = ScalarEmbedder(hidden_size, time_factor) if guidance_embed else None
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(hidden_size, num_heads, mlp_channels, qkv_bias) for _ in range(depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(hidden_size, num_heads, mlp_channels) for _ in range(depth_single_blocks)
        )
        self.final_layer = FinalLayer(hidden_size, in_channels)

    def time_embedding(self, timestep: Tensor, guidance: Tensor | None) -> Tensor:
        """`(batch, channels)` from `timestep` `(batch,)` in [0, 1], 0 being noise.

        `guidance` `(batch,)` is the scale as a user gives it, and must be there where the model embeds it, only there.
        """
        assert (guidance is None) == (self.guidance_in is None)
        temb = self.time_in(timestep)
        return temb if self.guidance_in is None else temb + self.guidance_in(guidance)

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor, guidance: Tensor | None = None) -> Tensor:
        """The velocity from noise to data, of the shape of `latents` `(batch, tokens, latent channels)`.

        `context` is `(batch, image tokens, context channels)`; for the rest see `time_embedding`.
        """
        temb = self.time_embedding(timestep, guidance)
        hidden_states, encoder_hidden_states = self.latent_in(latents), self.cond_in(context)
        for block in (*self.double_blocks, *self.single_blocks):
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, temb)
        return self.final_layer(hidden_states, temb)


def _mlp(channels: int, mlp_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, mlp_channels), nn.GELU(approximate="tanh"), nn.Linear(mlp_channels, channels)
    )


def _modulated(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=_EPS) * (1 + scale) + shift


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of `(batch, heads, tokens, head channels)`; the result is `(batch, tokens, channels)`."""
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
