"""The backbones of all families."""

import pytest
import torch

from models.families.hunyuan3d.plain_dit import MixtureOfExperts
from training.backbone import Backbone, run_all
from training.lesson import Condition, Lesson
from training.scenes.backbones import CELLS, FluxBackbone, QwenImageBackbone, build_flux, build_qwen_image
from training.scenes.text import MAX_SEQUENCE_LENGTH, QWEN_SEQUENCE_LENGTH
from training.solids.backbone import EveryExpert, Hunyuan3DBackbone, build_hunyuan3d


@pytest.mark.parametrize("family", ["flux", "qwen_image", "hunyuan3d"])
@torch.no_grad()
def test_new_transformer_predicts_zero_and_its_blocks_change_nothing(family: str) -> None:
    """At the size of the trained model."""
    backbone: Backbone
    if family == "flux":
        backbone = FluxBackbone(build_flux())
        condition = Condition(torch.ones(1, MAX_SEQUENCE_LENGTH, 128), torch.ones(1, 128), None)
    elif family == "hunyuan3d":
        backbone = Hunyuan3DBackbone(build_hunyuan3d())
        condition = Condition(torch.ones(1, 65, 192), None, None)
    else:
        backbone = QwenImageBackbone(build_qwen_image())
        condition = Condition(
            torch.ones(1, QWEN_SEQUENCE_LENGTH, 128), None, torch.arange(QWEN_SEQUENCE_LENGTH)[None] < 9
        )
    channels = 16 if family == "hunyuan3d" else 32
    latents = torch.randn(1, CELLS * CELLS, channels, generator=torch.Generator().manual_seed(1))
    streams = backbone.prologue(latents, torch.tensor([0.2]), torch.ones(1), condition)
    assert streams.hidden_states.shape == (1, 64, backbone.channels)
    for i, block in enumerate(backbone.blocks.values()):
        streams = backbone.enter(i, streams)
        encoder_hidden_states, hidden_states = backbone.call_block(block, streams)
        assert torch.equal(encoder_hidden_states, streams.encoder_hidden_states)
        assert torch.equal(hidden_states, streams.hidden_states)
        streams = backbone.leave(i, streams)
    assert torch.equal(backbone.epilogue(streams), torch.zeros(1, 64, channels))


@torch.no_grad()
def test_prologue_blocks_and_epilogue_equal_the_forward(backbone: Backbone, lesson: Lesson) -> None:
    condition = lesson.full_conditions([0, 1])
    rng = torch.Generator().manual_seed(2)
    latents, timestep = torch.randn(2, CELLS * CELLS, 32, generator=rng), torch.tensor([0.2, 0.9])
    guidance = torch.tensor([1.0, 4.0])
    if isinstance(backbone, FluxBackbone):
        expected = backbone.transformer(
            hidden_states=latents,
            encoder_hidden_states=condition.embeds,
            pooled_projections=condition.pooled,
            timestep=timestep,
            guidance=guidance,
            img_ids=torch.tensor([[0.0, row, column] for row in range(CELLS) for column in range(CELLS)]),
            txt_ids=torch.zeros(MAX_SEQUENCE_LENGTH, 3),
            return_dict=False,
        )[0]
    elif isinstance(backbone, QwenImageBackbone):
        expected = backbone.transformer(
            hidden_states=latents,
            encoder_hidden_states=condition.embeds,
            encoder_hidden_states_mask=condition.mask,
            timestep=timestep,
            img_shapes=[[(1, CELLS, CELLS)]] * 2,
            return_dict=False,
        )[0]
    else:
        assert isinstance(backbone, Hunyuan3DBackbone)
        expected = -backbone.transformer(latents, 1 - timestep, condition.embeds)
    assert torch.equal(run_all(backbone, backbone.prologue(latents, timestep, guidance, condition)), expected)


@torch.no_grad()
def test_running_every_expert_equals_the_mixture() -> None:
    torch.manual_seed(0)
    mixture = MixtureOfExperts(16, num_experts=5, top_k=2)
    tokens = torch.randn(3, 7, 16)
    every_expert = EveryExpert(mixture)
    torch.testing.assert_close(every_expert(tokens), mixture(tokens))
    assert list(every_expert.state_dict()) == list(mixture.state_dict())
