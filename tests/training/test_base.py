from typing import Any

import pytest
import torch
from torch import nn

from training.backbones import Backbone
from training.base import WidthMasks, _Objective, sample, split_optimizers
from training.scenes import COLOURS, SHAPES, SIZES, TEXTURES, TONES, sample_scene, training_scenes

SCENES = list(training_scenes(0, 600))
# Under autocast: norms keep their weights in float32.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")

FRAGMENT_WORDS = {*COLOURS, *SHAPES, *SIZES, *TEXTURES, *TONES, "a", "objects", "background"}


@pytest.fixture
def objective(backbone: Backbone, conditioner: Any) -> _Objective:
    return _Objective(backbone, conditioner)


def test_some_samples_have_no_prompt_and_where_guidance_is_true_some_only_a_fragment(
    objective: _Objective, backbone: Backbone
) -> None:
    prompts, told = objective._prompts(SCENES, torch.Generator().manual_seed(0))
    captions = [scene.caption for scene in SCENES]
    assert [prompt == caption for prompt, caption in zip(prompts, captions, strict=True)] == told.tolist()
    others = [prompt for prompt, is_told in zip(prompts, told, strict=True) if not is_told]
    fragments = [prompt for prompt in others if prompt]
    assert 0.05 < others.count("") / len(SCENES) < 0.15
    if backbone.has_guidance_embedding:
        assert fragments == []
    else:
        assert 0.05 < len(fragments) / len(SCENES) < 0.15
        assert all(set(fragment.split()) <= FRAGMENT_WORDS for fragment in fragments)
        assert len(set(fragments)) > 10


def test_prompts_follow_from_the_generator_alone(objective: _Objective) -> None:
    first, again, other = (objective._prompts(SCENES[:40], torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_narrow_mlps_are_masked_to_a_prefix(backbone: Backbone) -> None:
    masks = WidthMasks(backbone)
    masks.set([0.25, 0.5, 0.75, 1.0, 0.25])
    for block, width in zip(backbone.blocks.values(), [0.25, 0.5, 0.75, 1.0, 0.25], strict=True):
        _, last, column = backbone.mlp_layers(block)
        seen: list[torch.Tensor] = []
        handle = last.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0]))
        last(torch.ones(1, last.in_features))
        handle.remove()
        kept = column + int((last.in_features - column) * width)
        assert seen[0][0].tolist() == [1.0] * kept + [0.0] * (last.in_features - kept)


@pytest.mark.parametrize("guided", [False, True])
def test_loss_reaches_the_weights_of_every_block(objective: _Objective, backbone: Backbone, guided: bool) -> None:
    """Within a few steps, since a step may leave blocks out."""
    scenes = [sample_scene(seed) for seed in range(6)]
    clean = torch.randn(6, 64, 32, generator=torch.Generator().manual_seed(0))
    for step in range(4):
        flow, auxiliary = objective(clean, scenes, torch.Generator().manual_seed(step), guided)
        (flow + auxiliary).backward()
        assert flow.isfinite()
    for block in backbone.blocks.values():
        first, last, _ = backbone.mlp_layers(block)
        for layer in (first, last):
            assert layer.weight.grad is not None
            assert layer.weight.grad.abs().sum() > 0


def test_modulations_are_not_trained_as_matrices(backbone: Backbone) -> None:
    matrices, others = split_optimizers(backbone.transformer, matrix_lr=0.1, lr=0.01)
    names = {id(parameter): name for name, parameter in backbone.transformer.named_parameters()}
    by_muon = {names[id(p)] for group in matrices.param_groups for p in group["params"]}
    by_adam = {names[id(p)] for group in others.param_groups for p in group["params"]}
    assert by_muon | by_adam == set(names.values())
    assert not by_muon & by_adam
    assert not any("norm" in name or "_mod." in name for name in by_muon)
    for block in backbone.blocks.values():
        first, _, _ = backbone.mlp_layers(block)
        assert names[id(first.weight)] in by_muon
    assert any("norm" in name or "_mod." in name for name in by_adam)


def test_samples_are_guided_away_from_no_prompt(backbone: Backbone, conditioner: Any) -> None:
    for module in backbone.transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    text, none = conditioner.encode(["a red circle", "a blue ring"]), conditioner.encode([""])
    at = {scale: sample(backbone, text, none, guidance_scale=scale, num_steps=1) for scale in (0.0, 1.0, 3.0)}
    torch.testing.assert_close(at[3.0] - at[0.0], 3 * (at[1.0] - at[0.0]), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(at[1.0], at[0.0], atol=1e-4)
