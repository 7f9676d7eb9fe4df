"""Hunyuan3D-2.0's denoiser, taken apart: what comes before the blocks, the blocks, what comes after them.

The image's stream stands where other families have the text's. It is never padded: all images have as many tokens.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from models.elastic.compute import BlockCost, attention_flops
from models.elastic.streams import Streams
from models.families.hunyuan3d.stream_dit import DoubleStreamBlock, Hunyuan3DDiT, SingleStreamBlock
from models.families.wrapping import Mlp


def prologue(
    transformer: Hunyuan3DDiT, latents: Tensor, timestep: Tensor, context: Tensor, guidance: Tensor | None = None
) -> Streams:
    """Embed latents `(batch, tokens, channels)`, `timestep` `(batch,)` in [0, 1] and the scale of guidance `(batch,)`.

    `context` are the images' tokens `(batch, image tokens, context channels)`, zeros in unconditional rows.
    """
    temb = transformer.time_embedding(timestep, guidance)
    return Streams(transformer.latent_in(latents), transformer.cond_in(context), temb)


def channels(transformer: Hunyuan3DDiT) -> int:
    """The width of the blocks."""
    return transformer.latent_in.out_features


def blocks(transformer: Hunyuan3DDiT) -> Mapping[str, nn.Module]:
    """The blocks in order, under the names that metrics and traces use: `double.00` .. `single.31`."""
    double = {f"double.{i:02d}": block for i, block in enumerate(transformer.double_blocks)}
    single = {f"single.{i:02d}": block for i, block in enumerate(transformer.single_blocks)}
    return double | single


def call_block(block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
    """Run one block, double or single: both return the image's stream, then the shape's."""
    result: tuple[Tensor, Tensor] = block(
        hidden_states=streams.hidden_states,
        encoder_hidden_states=streams.encoder_hidden_states,
        temb=streams.temb,
    )
    return result


def mlps(block: nn.Module) -> Mapping[str, Mlp]:
    """The MLP that may be narrowed: in a double block, the shape stream's."""
    if isinstance(block, DoubleStreamBlock):
        first, last = block.img_mlp[0], block.img_mlp[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return {"": Mlp(first, last)}
    assert isinstance(block, SingleStreamBlock)
    width = block.linear1.in_features
    return {"": Mlp(block.linear1, block.linear2, row=3 * width, column=width)}


def epilogue(transformer: Hunyuan3DDiT, streams: Streams) -> Tensor:
    """Returns the velocity `(batch, tokens, latent channels)`, float32."""
    velocity: Tensor = transformer.final_layer(streams.hidden_states, streams.temb)
    return velocity.float()


def block_costs(
    transformer: Hunyuan3DDiT, num_latents: int, num_image_tokens: int, has_context: bool
) -> Mapping[str, BlockCost]:
    """Floating-point operations of one row in every block, which has no shortcut for an empty context."""
    assert has_context
    width = channels(transformer)
    square, tokens = 2.0 * width * width, num_latents + num_image_tokens
    attention = square * 4 * tokens + attention_flops(tokens, width)
    costs = {}
    for name, block in blocks(transformer).items():
        # Two multiplications, there and back, by the width and the MLP's hidden neurons.
        mlp = 4.0 * width * mlps(block)[""].num_hidden
        if isinstance(block, DoubleStreamBlock):
            costs[name] = BlockCost(fixed=square * 12 + attention + mlp * num_image_tokens, mlp=mlp * num_latents)
        else:
            costs[name] = BlockCost(fixed=square * 3 + attention, mlp=mlp * tokens)
    return costs
