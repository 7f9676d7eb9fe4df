"""Hunyuan3D-2.1's denoiser, taken apart: what comes before the blocks, the blocks, what comes after them.

Of the two streams the text stream is here the time token alone. A block that reads what an earlier one left mixes it in
whatever its plan is, since that entry is no residual: a skipped block leaves out only its three branches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.elastic.compute import BlockCost, attention_flops
from models.elastic.streams import Streams, row_index
from models.families.hunyuan3d.plain_dit import HunYuanDiTBlock, HunYuanDiTPlain
from models.families.hunyuan3d.streams import PlainStreams
from models.families.wrapping import Mlp


def prologue(
    transformer: HunYuanDiTPlain,
    latents: Tensor,
    timestep: Tensor,
    context: Tensor,
    context_rows: Sequence[int] | None = None,
) -> PlainStreams:
    """Embed latents `(batch, tokens, channels)` and `timestep` `(batch,)` in [0, 1].

    `context` is the images' tokens, `(rows with an image, image tokens, context channels)`, and `context_rows` the
    numbers of these rows, None where every row has an image.
    """
    temb = transformer.time_token(timestep)
    index = None if context_rows is None else row_index(context_rows, context.device)
    return PlainStreams(transformer.x_embedder(latents), temb[:, None], temb, context, context_rows, index)


def channels(transformer: HunYuanDiTPlain) -> int:
    """The width of the blocks."""
    return transformer.x_embedder.out_features


def blocks(transformer: HunYuanDiTPlain) -> Mapping[str, nn.Module]:
    """The blocks in order, under the names that metrics and traces use: `block.00` .. `block.20`."""
    return {f"block.{i:02d}": block for i, block in enumerate(transformer.blocks)}


def call_block(block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
    """Run one block's branches: the time token, then the shape's tokens."""
    assert isinstance(streams, PlainStreams)
    inputs = {"hidden_states": _joined(streams), "context": streams.context, "context_rows": streams.context_index}
    return _apart(block(**inputs))


def mlps(block: nn.Module) -> Mapping[str, Mlp]:
    """The MLPs that may be narrowed: the only one, or every expert, the shared one too."""
    assert isinstance(block, HunYuanDiTBlock)
    if not block.has_experts:
        return {"": Mlp(_linear(block.mlp, "fc1"), _linear(block.mlp, "fc2"))}
    experts: dict[str, nn.Module] = {"shared": block.moe.shared_experts}
    experts |= {f"expert.{i}": expert for i, expert in enumerate(block.moe.experts)}
    return {name: Mlp(_linear(expert, "net.0.proj"), _linear(expert, "net.2")) for name, expert in experts.items()}


def enter_hook(transformer: HunYuanDiTPlain, index: int) -> Callable[[Streams], Streams] | None:
    """What happens before the block of this number, for every row: mixing in what an earlier one left."""
    source, block = transformer.skip_source(index), _block(transformer, index)
    if source is None:
        return None

    def enter(streams: Streams) -> Streams:
        assert isinstance(streams, PlainStreams)
        left = dict(streams.long_skips)
        time_token, hidden_states = _apart(block.fuse(_joined(streams), left.pop(source)))
        return replace(streams, hidden_states=hidden_states, encoder_hidden_states=time_token, long_skips=left)

    return enter


def leave_hook(transformer: HunYuanDiTPlain, index: int) -> Callable[[Streams], Streams] | None:
    """What happens after the block of this number, for every row: leaving the state for a later one that reads it."""
    if index not in {transformer.skip_source(i) for i in range(len(transformer.blocks))}:
        return None

    def leave(streams: Streams) -> Streams:
        assert isinstance(streams, PlainStreams)
        return replace(streams, long_skips={**streams.long_skips, index: _joined(streams)})

    return leave


def epilogue(transformer: HunYuanDiTPlain, streams: Streams) -> Tensor:
    """Returns the velocity `(batch, tokens, latent channels)`, float32."""
    velocity: Tensor = transformer.final_layer(_joined(streams))
    return velocity.float()


def block_costs(
    transformer: HunYuanDiTPlain, num_latents: int, num_image_tokens: int, has_context: bool
) -> Mapping[str, BlockCost]:
    """Floating-point operations of one row in every block; without context no attention to the image."""
    width, tokens = channels(transformer), num_latents + 1
    square = 2.0 * width * width
    attention = square * 4 * tokens + attention_flops(tokens, width)
    if has_context:
        context_dim = _block(transformer, 0).attn2.to_k.in_features
        attention += square * 2 * tokens + 4.0 * width * context_dim * num_image_tokens
        attention += attention_flops(tokens, width, num_image_tokens)
    costs = {}
    for i, (name, block) in enumerate(blocks(transformer).items()):
        assert isinstance(block, HunYuanDiTBlock)
        num_mlps, gate = 1, 0.0
        if block.has_experts:
            num_mlps, gate = 1 + block.moe.top_k, 2.0 * width * len(block.moe.experts) * tokens
        fuse = 0.0 if transformer.skip_source(i) is None else square * 2 * tokens
        costs[name] = BlockCost(fixed=attention + gate, mlp=square * 8 * tokens * num_mlps, always=fuse)
    return costs


def _linear(module: nn.Module, name: str) -> nn.Linear:
    linear = module.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear


def _block(transformer: HunYuanDiTPlain, index: int) -> HunYuanDiTBlock:
    block = transformer.blocks[index]
    assert isinstance(block, HunYuanDiTBlock)
    return block


def _joined(streams: Streams) -> Tensor:
    return torch.cat((streams.encoder_hidden_states, streams.hidden_states), dim=1)


def _apart(hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    return hidden_states[:, :1], hidden_states[:, 1:]
