"""Qwen-Image's transformer, taken apart: prologue, blocks, epilogue."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from models.elastic.streams import Streams
from models.families.qwen_image.streams import QwenImageStreams
from models.families.wrapping import Mlp


def prologue(
    transformer: QwenImageTransformer2DModel,
    latents: Tensor,
    timestep: Tensor,
    context: Tensor,
    mask: Tensor | None,
    text_lengths: Sequence[int] | None,
    rotary_emb: tuple[Tensor, Tensor],
    num_noise_tokens: int | None = None,
) -> QwenImageStreams:
    """Embed packed latents `(batch, tokens, channels)` and `timestep` `(batch,)` in [0, 1].

    `context` is the prompts after `embed_prompt`, `(batch, text tokens, channels)`. `mask` `(batch, text tokens)` is
    true for their real tokens, and `text_lengths` counts these by row; both are None where all tokens are real.
    `rotary_emb` holds the factors of `rotary_embedding`. The first `num_noise_tokens` of the latents, all if None, are
    noise. A transformer with `zero_cond_t` modulates the others, which are of pictures, as at the time 0.

    Operations and their order are those of `QwenImageTransformer2DModel.forward` (diffusers 0.42), so results are
    bitwise equal.
    """
    hidden_states = transformer.img_in(latents)
    timestep = timestep.to(hidden_states.dtype)
    if not transformer.zero_cond_t:
        temb = transformer.time_text_embed(timestep, hidden_states)
        return QwenImageStreams(hidden_states, context, temb, *rotary_emb, mask, text_lengths)
    both = transformer.time_text_embed(torch.cat((timestep, timestep * 0)), hidden_states)
    temb, picture_temb = both.chunk(2)
    num_tokens = latents.shape[1]
    is_picture = (torch.arange(num_tokens, device=temb.device) >= (num_noise_tokens or num_tokens)).int()
    return QwenImageStreams(hidden_states, context, temb, *rotary_emb, mask, text_lengths, picture_temb, is_picture)


def embed_prompt(transformer: QwenImageTransformer2DModel, prompt_embeds: Tensor) -> Tensor:
    """Projects the text encoder's output `(batch, text tokens, text channels)` to the transformer's width."""
    context: Tensor = transformer.txt_in(transformer.txt_norm(prompt_embeds))
    return context


def blocks(transformer: QwenImageTransformer2DModel) -> Mapping[str, QwenImageTransformerBlock]:
    """The blocks in order, under the names that metrics and traces use: `block.00` .. `block.59`."""
    return {f"block.{i:02d}": block for i, block in enumerate(transformer.transformer_blocks)}


def channels(transformer: QwenImageTransformer2DModel) -> int:
    """The width of the blocks."""
    return int(transformer.inner_dim)


def call_block(block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
    """Run one original block. It returns the text stream, then the image stream."""
    assert isinstance(streams, QwenImageStreams)
    temb, is_picture = streams.temb, None
    if streams.picture_temb is not None and streams.is_picture is not None:
        is_picture = streams.is_picture.expand(len(temb), -1)
        temb = torch.cat((temb, streams.picture_temb))
    result: tuple[Tensor, Tensor] = block(
        hidden_states=streams.hidden_states,
        encoder_hidden_states=streams.encoder_hidden_states,
        encoder_hidden_states_mask=streams.encoder_hidden_states_mask,
        temb=temb,
        image_rotary_emb=(streams.image_rotary_emb, streams.text_rotary_emb),
        joint_attention_kwargs=None,
        modulate_index=is_picture,
    )
    return result


def mlps(block: nn.Module) -> Mapping[str, Mlp]:
    """The MLP that may be narrowed is the image stream's. The text MLP always runs in full.

    As in Elastic-DiT at ce39f1d, `qwen_image_dit.py`.
    """
    assert isinstance(block, QwenImageTransformerBlock)
    first, last = block.img_mlp.net[0].proj, block.img_mlp.net[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    return {"": Mlp(first, last)}


def epilogue(transformer: QwenImageTransformer2DModel, streams: Streams) -> Tensor:
    """Returns the velocity `(batch, image tokens, channels)`."""
    velocity: Tensor = transformer.proj_out(transformer.norm_out(streams.hidden_states, streams.temb))
    return velocity


def rotary_embedding(
    transformer: QwenImageTransformer2DModel,
    num_text_tokens: int,
    height: int,
    width: int,
    references: Sequence[tuple[int, int]] = (),
) -> tuple[Tensor, Tensor]:
    """Complex factors `(tokens, head channels / 2)` of the image tokens, then of the text tokens.

    The image is of `height` x `width` tokens. Those of the pictures beside it follow, whose heights and widths are
    `references`.
    """
    shapes = [(1, *size) for size in ((height, width), *references)]
    image, text = transformer.pos_embed([shapes], max_txt_seq_len=num_text_tokens, device=transformer.device)
    return image, text
