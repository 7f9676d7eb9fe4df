import pytest
import torch
from torch import nn

from training.backbones import Backbone, Hunyuan3DBackbone
from training.base import WidthMasks, _Objective, sample, split_optimizers
from training.lesson import Lesson

# Under autocast: norms keep their weights in float32.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")


@pytest.fixture
def objective(backbone: Backbone, lesson: Lesson) -> _Objective:
    return _Objective(backbone, lesson)


def test_narrow_mlps_are_masked_to_a_prefix(backbone: Backbone) -> None:
    masks = WidthMasks(backbone)
    masks.set([0.25, 0.5, 0.75, 1.0, 0.25])
    for block, width in zip(backbone.blocks.values(), [0.25, 0.5, 0.75, 1.0, 0.25], strict=True):
        for _, last, _, column in backbone.mlps(block).values():
            seen: list[torch.Tensor] = []
            handle = last.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[0]))
            last(torch.ones(1, last.in_features))
            handle.remove()
            kept = column + int((last.in_features - column) * width)
            assert seen[0][0].tolist() == [1.0] * kept + [0.0] * (last.in_features - kept)


@pytest.mark.parametrize("guided", [False, True])
def test_loss_reaches_the_weights_of_every_block(objective: _Objective, backbone: Backbone, guided: bool) -> None:
    """Within a few steps, since a step may leave blocks out."""
    for step in range(4):
        flow, auxiliary = objective([0, 1, 2, 3, 4, 5], torch.Generator().manual_seed(step), guided)
        (flow + auxiliary).backward()
        assert flow.isfinite()
    for block in backbone.blocks.values():
        for mlp in backbone.mlps(block).values():
            for layer in (mlp.first, mlp.last):
                assert layer.weight.grad is not None
                assert layer.weight.grad.abs().sum() > 0


def test_modulations_are_not_trained_as_matrices(backbone: Backbone) -> None:
    matrices, others = split_optimizers(backbone.transformer, matrix_lr=0.1, lr=0.01)
    names = {id(parameter): name for name, parameter in backbone.transformer.named_parameters()}
    by_muon = {names[id(p)] for group in matrices.param_groups for p in group["params"]}
    by_adam = {names[id(p)] for group in others.param_groups for p in group["params"]}
    assert by_muon | by_adam == set(names.values())
    assert not by_muon & by_adam
    assert not any("norm" in name or "_mod." in name or ".gate." in name for name in by_muon)
    for block in backbone.blocks.values():
        assert all(names[id(mlp.first.weight)] in by_muon for mlp in backbone.mlps(block).values())
    assert any("norm" in name or "_mod." in name for name in by_adam)
    assert any(".gate." in name for name in by_adam) == isinstance(backbone, Hunyuan3DBackbone)


def test_samples_are_guided_away_from_no_condition(backbone: Backbone, lesson: Lesson) -> None:
    for module in backbone.transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.1)
    told, none = lesson.full_conditions([0, 1]), lesson.no_condition
    at = {scale: sample(backbone, told, none, (64, 32), guidance_scale=scale, num_steps=1) for scale in (0.0, 1.0, 3.0)}
    torch.testing.assert_close(at[3.0] - at[0.0], 3 * (at[1.0] - at[0.0]), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(at[1.0], at[0.0], atol=1e-4)
