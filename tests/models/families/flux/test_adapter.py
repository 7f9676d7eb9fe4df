import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn

from models.families.flux import adapter


def build_transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    ).requires_grad_(False)


@pytest.mark.parametrize("guidance_embeds", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("batch", [1, 3])
def test_all_pieces_together_equal_the_forward_bit_for_bit(guidance_embeds: bool, batch: int) -> None:
    transformer = build_transformer(guidance_embeds)
    rng = torch.Generator().manual_seed(1)
    latents, prompt_embeds = torch.randn(batch, 6, 8, generator=rng), torch.randn(batch, 5, 24, generator=rng)
    pooled, timestep = torch.randn(batch, 12, generator=rng), torch.rand(batch, generator=rng)
    guidance = 1 + torch.rand(batch, generator=rng) if guidance_embeds else None
    image_ids = torch.tensor([[0.0, row, column] for row in range(2) for column in range(3)])
    expected = transformer(
        hidden_states=latents,
        encoder_hidden_states=prompt_embeds,
        pooled_projections=pooled,
        timestep=timestep,
        guidance=guidance,
        img_ids=image_ids,
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )[0]
    streams = adapter.prologue(
        transformer,
        latents,
        timestep,
        guidance,
        transformer.context_embedder(prompt_embeds),
        pooled,
        adapter.rotary_embedding(transformer, 5, 2, 3),
    )
    for block in adapter.blocks(transformer).values():
        text, image = adapter.call_block(block, streams)
        streams = replace(streams, hidden_states=image, encoder_hidden_states=text)
    assert torch.equal(adapter.epilogue(transformer, streams), expected)


def test_blocks_are_named_in_the_order_they_run() -> None:
    transformer = build_transformer(True)
    blocks = adapter.blocks(transformer)
    assert list(blocks) == ["double.00", "double.01", "single.00", "single.01", "single.02"]
    assert list(blocks.values()) == [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


@pytest.mark.parametrize("block", [FluxTransformerBlock, FluxSingleTransformerBlock])
def test_blocks_take_the_keywords_that_they_are_called_by(block: type[nn.Module]) -> None:
    """A diffusers release that adds or renames an argument has to be looked at."""
    assert list(inspect.signature(block.forward).parameters) == [
        "self",
        "hidden_states",
        "encoder_hidden_states",
        "temb",
        "image_rotary_emb",
        "joint_attention_kwargs",
    ]
