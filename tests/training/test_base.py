import pytest
import torch

from training.backbone import Backbone
from training.base import BaseObjective, WidthMasks
from training.lesson import Lesson

# Under autocast, norms keep their weights in float32.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")


@pytest.fixture
def objective(backbone: Backbone, lesson: Lesson) -> BaseObjective:
    return BaseObjective(backbone, lesson)


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
def test_loss_reaches_the_weights_of_every_block(objective: BaseObjective, backbone: Backbone, guided: bool) -> None:
    """Within a few steps, because a single step may skip blocks."""
    for step in range(4):
        flow, auxiliary = objective([0, 1, 2, 3, 4, 5], torch.Generator().manual_seed(step), guided)
        (flow + auxiliary).backward()
        assert flow.isfinite()
    for block in backbone.blocks.values():
        for mlp in backbone.mlps(block).values():
            for layer in (mlp.first, mlp.last):
                assert layer.weight.grad is not None
                assert layer.weight.grad.abs().sum() > 0
