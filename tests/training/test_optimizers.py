import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from training.backbone import Backbone
from training.loop import Stateful, run_loop
from training.optimizers import ScheduledOptimizers, split_optimizers, warm_then_linear
from training.solids.backbone import Hunyuan3DBackbone


def test_learning_rate_rises_holds_and_falls_to_its_end() -> None:
    factors = [warm_then_linear(step, 100, warm_up=10, hold=0.5, end=0.1) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10:51] == pytest.approx([1.0] * 41)
    assert factors[75] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)


def test_gradients_of_all_optimizers_are_clipped_to_one_common_norm() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizers = [torch.optim.SGD([first], lr=1.0), torch.optim.SGD([second], lr=10.0)]
    scheduled = ScheduledOptimizers(optimizers, lambda step: 0.5)
    scheduled.minimise((30 * first + 40 * second).sum(), 0)
    torch.testing.assert_close(torch.cat((first, second)), torch.tensor([-0.3, -4.0]))


def test_gradients_of_an_earlier_step_are_dropped() -> None:
    weight = nn.Parameter(torch.zeros(1))
    scheduled = ScheduledOptimizers([torch.optim.SGD([weight], lr=1.0)], lambda step: 1.0)
    for step, slope in enumerate((0.25, -0.5)):
        scheduled.minimise((slope * weight).sum(), step)
    torch.testing.assert_close(weight.detach(), torch.tensor([0.25]))


def test_resumed_run_takes_the_rates_and_the_state_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def train(checkpoint: Path, num_steps: int, stop_at: int | None = None) -> nn.Linear:
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        optimizers = [torch.optim.AdamW([model.weight], lr=0.1), torch.optim.AdamW([model.bias], lr=0.01)]
        schedule = partial(warm_then_linear, num_steps=num_steps, warm_up=2, hold=0.3, end=0.1)
        scheduled = ScheduledOptimizers(optimizers, schedule)

        def train_step(step: int) -> dict[str, float]:
            if step == stop_at:
                raise KeyboardInterrupt
            inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            scheduled.minimise(model(inputs).square().mean(), step)
            return {}

        named = {f"optimizer.{i}": optimizer for i, optimizer in enumerate(optimizers)}
        state: dict[str, Stateful] = {"model": model, **named}
        run_loop("resumed", num_steps, train_step, state, checkpoint, save_every=3)
        return model

    whole = train(tmp_path / "whole.pt", 10)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken.pt", 10, stop_at=8)
    resumed = train(tmp_path / "broken.pt", 10)
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    before = copy.deepcopy(unused)
    optimizer = torch.optim.AdamW([used, unused], lr=0.1, weight_decay=0.0)
    ScheduledOptimizers([optimizer], lambda step: 1.0).minimise(used.sum(), 0)
    assert torch.equal(unused, before)
    assert not torch.equal(used, before)


def test_modulations_are_not_trained_by_muon(backbone: Backbone) -> None:
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
