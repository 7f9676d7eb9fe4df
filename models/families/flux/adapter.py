"""FLUX's transformer, taken apart: prologue, blocks, epilogue."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from models.elastic.streams import Streams
from models.families.flux.streams import FluxStreams
from models.families.wrapping import Mlp

FluxBlock = FluxTransformerBlock | FluxSingleTransformerBlock


def prologue(
    transformer: FluxTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    guidance: Tensor | None,
    context: Tensor,
    pooled_prompt_embeds: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
) -> FluxStreams:
    """Embed packed latents `(batch, tokens, channels)`, `timestep` `(batch,)` in [0, 1], guidance and pooled prompts.

    `context` is the prompts after `context_embedder`, `(batch, text tokens, channels)`, which serve all steps.

    Operations and their order are those of `FluxTransformer2DModel.forward` (diffusers 0.42), so results are bitwise
    equal.
    """
    hidden_states = transformer.x_embedder(latents)
    timestep = timestep.to(hidden_states.dtype) * 1000
    if guidance is None:
        temb = transformer.time_text_embed(timestep, pooled_prompt_embeds)
    else:
        guidance = guidance.to(hidden_states.dtype) * 1000
        temb = transformer.time_text_embed(timestep, guidance, pooled_prompt_embeds)
    return FluxStreams(hidden_states, context, temb, image_rotary_emb)


def blocks(transformer: FluxTransformer2DModel) -> Mapping[str, FluxBlock]:
    """The blocks in order, under the names that metrics and traces use: `double.00` .. `single.37`."""
    double = {f"double.{i:02d}": block for i, block in enumerate(transformer.transformer_blocks)}
    single = {f"single.{i:02d}": block for i, block in enumerate(transformer.single_transformer_blocks)}
    return double | single


def channels(transformer: FluxTransformer2DModel) -> int:
    """The width of the blocks."""
    return int(transformer.inner_dim)


def call_block(block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
    """Run one original block. Double and single blocks return the text stream, then the image stream."""
    assert isinstance(streams, FluxStreams)
    result: tuple[Tensor, Tensor] = block(
        hidden_states=streams.hidden_states,
        encoder_hidden_states=streams.encoder_hidden_states,
        temb=streams.temb,
        image_rotary_emb=streams.image_rotary_emb,
        joint_attention_kwargs=None,
    )
    return result


def mlps(block: nn.Module) -> Mapping[str, Mlp]:
    """The MLP that may be narrowed. In a double block it is the image stream's."""
    if isinstance(block, FluxTransformerBlock):
        first, last = block.ff.net[0].proj, block.ff.net[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return {"": Mlp(first, last)}
    assert isinstance(block, FluxSingleTransformerBlock)
    column = block.proj_out.in_features - block.proj_mlp.out_features
    return {"": Mlp(block.proj_mlp, block.proj_out, column=column)}


def epilogue(transformer: FluxTransformer2DModel, streams: Streams) -> Tensor:
    """Returns the velocity `(batch, image tokens, channels)`."""
    velocity: Tensor = transformer.proj_out(transformer.norm_out(streams.hidden_states, streams.temb))
    return velocity


def rotary_embedding(
    transformer: FluxTransformer2DModel,
    num_text_tokens: int,
    height: int,
    width: int,
    references: Sequence[tuple[int, int]] = (),
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(text tokens + image tokens, head channels)`.

    The image is of `height` x `width` tokens. The heights and widths in `references` are those of pictures beside it:
    their positions begin anew and lie on a plane of their own, 1, as in FLUX.1-Kontext.
    """
    device = transformer.device
    ids = [torch.zeros(num_text_tokens, 3, device=device), _image_ids(height, width, 0, device)]
    ids += [_image_ids(*size, 1, device) for size in references]
    result: tuple[Tensor, Tensor] = transformer.pos_embed(torch.cat(ids))
    return result


def _image_ids(height: int, width: int, plane: int, device: torch.device) -> Tensor:
    ids = torch.zeros(height, width, 3, device=device)
    ids[..., 0] = plane
    ids[..., 1] += torch.arange(height, device=device)[:, None]
    ids[..., 2] += torch.arange(width, device=device)[None, :]
    return ids.reshape(-1, 3)
