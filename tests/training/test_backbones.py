"""Every family's transformer, as training takes it apart."""

from dataclasses import replace

import pytest
import torch

from training.backbones import CELLS, Backbone, FluxBackbone, QwenImageBackbone, build_flux, build_qwen_image
from training.text import MAX_SEQUENCE_LENGTH, QWEN_SEQUENCE_LENGTH, Conditioner, Text


@pytest.mark.parametrize("family", ["flux", "qwen_image"])
@torch.no_grad()
def test_new_transformer_predicts_nothing_and_its_blocks_change_nothing(family: str) -> None:
    """At the size that is trained."""
    backbone: Backbone
    if family == "flux":
        backbone = FluxBackbone(build_flux())
        text = Text(torch.ones(1, MAX_SEQUENCE_LENGTH, 128), torch.ones(1, 128), None)
    else:
        backbone = QwenImageBackbone(build_qwen_image())
        text = Text(torch.ones(1, QWEN_SEQUENCE_LENGTH, 128), None, torch.arange(QWEN_SEQUENCE_LENGTH)[None] < 9)
    latents = torch.randn(1, CELLS * CELLS, 32, generator=torch.Generator().manual_seed(1))
    streams = backbone.prologue(latents, torch.tensor([0.2]), torch.ones(1), text)
    assert streams.hidden_states.shape == (1, 64, backbone.channels)
    for block in backbone.blocks.values():
        text_stream, image_stream = backbone.call_block(block, streams)
        assert torch.equal(text_stream, streams.encoder_hidden_states)
        assert torch.equal(image_stream, streams.hidden_states)
    assert torch.equal(backbone.epilogue(streams), torch.zeros(1, 64, 32))


@torch.no_grad()
def test_parts_together_equal_the_forward(backbone: Backbone, conditioner: Conditioner) -> None:
    text = conditioner.encode(["a red circle", "a large blue square on the right"])
    rng = torch.Generator().manual_seed(2)
    latents, timestep = torch.randn(2, CELLS * CELLS, 32, generator=rng), torch.tensor([0.2, 0.9])
    guidance = torch.tensor([1.0, 4.0])
    if isinstance(backbone, FluxBackbone):
        expected = backbone.transformer(
            hidden_states=latents,
            encoder_hidden_states=text.embeds,
            pooled_projections=text.pooled,
            timestep=timestep,
            guidance=guidance,
            img_ids=torch.tensor([[0.0, row, column] for row in range(CELLS) for column in range(CELLS)]),
            txt_ids=torch.zeros(MAX_SEQUENCE_LENGTH, 3),
            return_dict=False,
        )[0]
    else:
        expected = backbone.transformer(
            hidden_states=latents,
            encoder_hidden_states=text.embeds,
            encoder_hidden_states_mask=text.mask,
            timestep=timestep,
            img_shapes=[[(1, CELLS, CELLS)]] * 2,
            return_dict=False,
        )[0]
    streams = backbone.prologue(latents, timestep, guidance, text)
    for block in backbone.blocks.values():
        text_stream, image_stream = backbone.call_block(block, streams)
        streams = replace(streams, hidden_states=image_stream, encoder_hidden_states=text_stream)
    assert torch.equal(backbone.epilogue(streams), expected)
