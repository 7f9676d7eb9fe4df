"""The toy transformer, taken apart. Its blocks read nothing besides the two streams and the time embedding."""

from collections.abc import Mapping

from torch import Tensor, nn

from models.elastic.streams import Streams
from models.families.wrapping import Mlp
from tests.models.families.toy_family.transformer import ToyBlock, ToyTransformer


def prologue(transformer: ToyTransformer, latents: Tensor, timestep: Tensor, context: Tensor) -> Streams:
    return Streams(transformer.image_in(latents), context, transformer.time_in(timestep[:, None]))


def channels(transformer: ToyTransformer) -> int:
    return int(transformer.config.channels)


def blocks(transformer: ToyTransformer) -> Mapping[str, nn.Module]:
    return {f"block.{i:02d}": block for i, block in enumerate(transformer.blocks)}


def call_block(block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = block(streams.hidden_states, streams.encoder_hidden_states, streams.temb)
    return result


def mlps(block: nn.Module) -> Mapping[str, Mlp]:
    assert isinstance(block, ToyBlock)
    return {"": Mlp(block.mlp_in, block.mlp_out)}


def epilogue(transformer: ToyTransformer, streams: Streams) -> Tensor:
    velocity: Tensor = transformer.image_out(streams.hidden_states)
    return velocity
