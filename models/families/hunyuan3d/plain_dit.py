"""Hunyuan3D-2.1's denoiser: a U-ViT with mixtures of experts, under the names of the public checkpoints.

The time token and the long skips are from Bao et al. 2023, "All are Worth Words", https://arxiv.org/abs/2209.12152.
Sizes and order of operations are those of Tencent-Hunyuan/Hunyuan3D-2.1 at 5e3ec6d, `hy3dshape`. Tokens have no
positions.
"""

from collections import OrderedDict
from collections.abc import Mapping, Set

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic.host import to_host
from models.errors import WeightsError

_EPS = 1e-6


def time_features(timestep: Tensor, channels: int) -> Tensor:
    """Sines, then cosines of the unscaled `timestep` `(batch,)` in [0, 1]: `(batch, channels)`, float32."""
    features: Tensor = get_timestep_embedding(timestep, channels, downscale_freq_shift=0)
    return features


class SelfAttention(nn.Module):
    """Attention of all tokens to all.

    The checkpoints' projections were trained as a single one that gives each head its query, key and value together.
    Therefore the outputs of `to_q`, `to_k` and `to_v` are joined first and then cut into heads.
    """

    def __init__(self, channels: int, num_heads: int, qk_norm: str | None, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_v = nn.Linear(channels, channels, bias=qkv_bias)
        self.q_norm, self.k_norm = (
            _head_norm(channels // num_heads, qk_norm),
            _head_norm(channels // num_heads, qk_norm),
        )
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        joint = torch.cat((self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)), dim=-1)
        query, key, value = joint.unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)
        return self.out_proj(_attend(self.q_norm(query), self.k_norm(key), value))


class CrossAttention(nn.Module):
    """Attention of the shape's tokens to the image's.

    Queries are cut into heads as usual. Keys and values were trained as one projection that gives each head its key and
    value together. Therefore the outputs of `to_k` and `to_v` are joined first and then cut into heads.
    """

    def __init__(self, channels: int, context_dim: int, num_heads: int, qk_norm: str | None, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(channels, channels, bias=qkv_bias)
        self.to_k = nn.Linear(context_dim, channels, bias=qkv_bias)
        self.to_v = nn.Linear(context_dim, channels, bias=qkv_bias)
        self.q_norm, self.k_norm = (
            _head_norm(channels // num_heads, qk_norm),
            _head_norm(channels // num_heads, qk_norm),
        )
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, hidden_states: Tensor, context: Tensor | None) -> Tensor:
        """Returns `(batch, tokens, channels)`, or `(channels,)` where `context` is None, which means zeros."""
        if context is None:
            return self._attend_to_zeros()
        query = self.to_q(hidden_states).unflatten(-1, (self.num_heads, -1))
        joint = torch.cat((self.to_k(context), self.to_v(context)), dim=-1)
        key, value = joint.unflatten(-1, (self.num_heads, 2, -1)).unbind(-2)
        return self.out_proj(_attend(self.q_norm(query), self.k_norm(key), value))

    def _attend_to_zeros(self) -> Tensor:
        """All context tokens have one value, made of the biases, so any attention weights return that value."""
        if self.to_v.bias is None:
            return self.out_proj.bias
        joint = torch.cat((self.to_k.bias, self.to_v.bias))
        value = joint.unflatten(0, (self.num_heads, 2, -1))[:, 1]
        return self.out_proj(value.flatten())


class MixtureOfExperts(nn.Module):
    """A shared expert for every token, plus the `top_k` experts with the highest gate probabilities, weighted by these.

    The probabilities are not rescaled to sum to 1. Experts have no capacity limit, so a token's result does not depend
    on the other tokens.
    """

    def __init__(self, channels: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(channels, num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(channels, activation_fn="gelu") for _ in range(num_experts))
        self.shared_experts = FeedForward(channels, activation_fn="gelu")

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers of each token's experts, `(..., top_k)` each, the highest weight first."""
        weights, chosen = self.gate(tokens).softmax(dim=-1).topk(self.top_k, dim=-1)
        return weights, chosen

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.flatten(0, -2)
        weights, chosen = self.route(tokens)
        of_expert, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(len(self.experts), device=tokens.device)
        # The one wait for the device: an expert can only be called once the number of its tokens is known.
        counts = to_host((of_expert[:, None] == numbers).sum(dim=0))
        parts = tokens.index_select(0, order // self.top_k).split(counts)
        grouped = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)])
        # Back to the tokens' order first, then a sum: adding in place to shared rows has no fixed order on a GPU.
        results = torch.empty_like(grouped).index_copy_(0, order, grouped).unflatten(0, (-1, self.top_k))
        routed = (results * weights.to(results.dtype)[..., None]).sum(dim=-2)
        return self.shared_experts(hidden_states) + routed.view_as(hidden_states)


class HunYuanDiTBlock(nn.Module):
    """Three residual branches. Where `reads` is true, the block first mixes in the output of an earlier block (`fuse`).

    The feed-forward is `mlp`, or `moe` where `num_experts` is not None.
    """

    def __init__(
        self,
        channels: int,
        context_dim: int,
        num_heads: int,
        qk_norm: str | None,
        qkv_bias: bool,
        reads: bool,
        num_experts: int | None,
        moe_top_k: int,
    ) -> None:
        super().__init__()
        if reads:
            self.skip_linear = nn.Linear(2 * channels, channels)
            self.skip_norm = nn.LayerNorm(channels, eps=_EPS)
        self.norm1 = nn.LayerNorm(channels, eps=_EPS)
        self.attn1 = SelfAttention(channels, num_heads, qk_norm, qkv_bias)
        self.norm2 = nn.LayerNorm(channels, eps=_EPS)
        self.attn2 = CrossAttention(channels, context_dim, num_heads, qk_norm, qkv_bias)
        self.norm3 = nn.LayerNorm(channels, eps=_EPS)
        if num_experts is None:
            layers = {
                "fc1": nn.Linear(channels, 4 * channels),
                "act": nn.GELU(),
                "fc2": nn.Linear(4 * channels, channels),
            }
            self.mlp = nn.Sequential(OrderedDict(layers))
        else:
            self.moe = MixtureOfExperts(channels, num_experts, moe_top_k)
        self.has_experts = num_experts is not None

    def fuse(self, hidden_states: Tensor, skip: Tensor) -> Tensor:
        """The state that a reading block starts from, in place of `hidden_states`. `skip` is its source's output."""
        return self.skip_norm(self.skip_linear(torch.cat((skip, hidden_states), dim=-1)))

    def forward(self, hidden_states: Tensor, context: Tensor | None, context_rows: Tensor | None = None) -> Tensor:
        """The residual branches. In a reading block they come after `fuse`.

        `hidden_states` is `(batch, 1 + tokens, channels)`, the time token first. `context` is `(batch, image tokens,
        context channels)`, or the context of `context_rows` alone: then the other rows have zeros, and attention to
        these costs nothing. None means zeros for all rows.
        """
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states))
        if context is None or context_rows is None:
            hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), context)
        else:
            looking = hidden_states[context_rows]
            looking = looking + self.attn2(self.norm2(looking), context)
            hidden_states = (hidden_states + self.attn2(hidden_states, None)).index_copy_(0, context_rows, looking)
        feed_forward = self.moe if self.has_experts else self.mlp
        return hidden_states + feed_forward(self.norm3(hidden_states))


class TimestepEmbedder(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, timestep: Tensor) -> Tensor:
        return self.mlp(time_features(timestep, self.channels).to(next(self.mlp.parameters()).dtype))


class FinalLayer(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(channels, eps=_EPS)
        self.linear = nn.Linear(channels, out_channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """From `(batch, 1 + tokens, channels)` to the velocity `(batch, tokens, latent channels)`."""
        return self.linear(self.norm_final(hidden_states[:, 1:]))


class HunYuanDiTPlain(nn.Module):
    """The whole model. Arguments are named as in a checkpoint's `config.yaml`.

    Raises WeightsError for settings that would need other tensors; no public checkpoint has them.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        hidden_size: int,
        context_dim: int,
        depth: int,
        num_heads: int,
        num_moe_layers: int,
        num_experts: int,
        moe_top_k: int,
        qkv_bias: bool,
        qk_norm: bool,
        qk_norm_type: str = "rms",
        norm_type: str = "layer",
        with_decoupled_ca: bool = False,
        use_attention_pooling: bool = False,
        use_pos_emb: bool = False,
        guidance_cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        _refuse(
            {
                "with_decoupled_ca": with_decoupled_ca,
                "use_attention_pooling": use_attention_pooling,
                "use_pos_emb": use_pos_emb,
                "guidance_cond_proj_dim": guidance_cond_proj_dim is not None,
                f"norm_type {norm_type}": norm_type != "layer",
                f"qk_norm_type {qk_norm_type}": qk_norm_type not in _HEAD_NORMS,
            }
        )
        if hidden_size % num_heads:
            raise WeightsError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        self.x_embedder = nn.Linear(in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.blocks = nn.ModuleList(
            HunYuanDiTBlock(
                hidden_size,
                context_dim,
                num_heads,
                qk_norm_type if qk_norm else None,
                qkv_bias,
                reads=i > depth // 2,
                num_experts=num_experts if depth - i <= num_moe_layers else None,
                moe_top_k=moe_top_k,
            )
            for i in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, in_channels)

    def skip_source(self, index: int) -> int | None:
        """The number of the block whose output block `index` reads in its `fuse`, None if it reads none."""
        middle = len(self.blocks) // 2
        return 2 * middle - index if index > middle else None

    def time_token(self, timestep: Tensor) -> Tensor:
        """`timestep` `(batch,)` is in [0, 1], 0 being noise; the token is `(batch, channels)`."""
        return self.t_embedder(timestep)

    def embed(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The input of the first block, `(batch, 1 + tokens, channels)`: the time token, then one token a latent."""
        return torch.cat((self.time_token(timestep)[:, None], self.x_embedder(latents)), dim=1)

    def forward(
        self, latents: Tensor, timestep: Tensor, context: Tensor | None, left_out: Set[int] = frozenset()
    ) -> Tensor:
        """The velocity from noise to data, of the shape of `latents` `(batch, tokens, latent channels)`.

        `timestep` is `(batch,)` in [0, 1], 0 being noise. `context` is `(batch, image tokens, context channels)`, None
        meaning zeros. Blocks in `left_out` run their `fuse` alone: it is no residual branch, and later layers were
        trained on its normalised result.
        """
        hidden_states = self.embed(latents, timestep)
        sources = {self.skip_source(i) for i in range(len(self.blocks))}
        stored: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks):
            assert isinstance(block, HunYuanDiTBlock)
            source = self.skip_source(i)
            if source is not None:
                hidden_states = block.fuse(hidden_states, stored.pop(source))
            if i not in left_out:
                hidden_states = block(hidden_states, context)
            if i in sources:
                stored[i] = hidden_states
        return self.final_layer(hidden_states)


def _refuse(unsupported: Mapping[str, bool]) -> None:
    """Raises WeightsError if any of these settings is set."""
    if any(unsupported.values()):
        names = ", ".join(name for name, is_set in unsupported.items() if is_set)
        raise WeightsError(f"HunYuanDiTPlain can't be built with: {names}")


class HeadRMSNorm(nn.RMSNorm):
    """Casts its weight to the type of its input: under autocast torch's own norm has no fast kernel for mixed types."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


_HEAD_NORMS = {"rms": HeadRMSNorm, "layer": nn.LayerNorm}


def _head_norm(channels: int, kind: str | None) -> nn.Module:
    return nn.Identity() if kind is None else _HEAD_NORMS[kind](channels, eps=_EPS)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of `(batch, tokens, heads, head channels)`; the result is `(batch, tokens, channels)`."""
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
