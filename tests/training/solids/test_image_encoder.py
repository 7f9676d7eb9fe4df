from pathlib import Path

import pytest
import torch

from training.solids.image_encoder import ConditionerObjective, build_conditioner, draw_weights
from training.solids.image_tasks import CHANNELS, Probe
from training.solids.images import SIDE
from training.solids.sampling import sample_solids


def test_single_primitives_are_an_eighth_of_the_samples() -> None:
    solids = sample_solids(range(50))
    weights = draw_weights(solids)
    is_single = torch.tensor([solid.operation is None for solid in solids])
    assert weights[is_single].sum() == pytest.approx(1 / 8)
    assert weights[~is_single].sum() == pytest.approx(7 / 8)
    assert [len(set(group.tolist())) for group in (weights[is_single], weights[~is_single])] == [1, 1]


@torch.no_grad()
def test_new_encoder_gives_each_patch_a_token_that_knows_its_position() -> None:
    conditioner = build_conditioner()
    tokens = conditioner(torch.rand(2, 3, SIDE, SIDE) * 2 - 1)
    assert tokens.shape == (2, 65, CHANNELS)
    assert tokens.std() > 0.5
    probe = Probe()
    points = torch.tensor([[[-0.9, 0.9, 0.0], [0.9, -0.9, 0.0]]]).expand(2, -1, -1)
    before = probe(tokens, points)
    # Change the content, not the position, of the patch in the upper left corner.
    tokens[:, 1, 8:] += torch.randn(CHANNELS - 8, generator=torch.Generator().manual_seed(0))
    change = (probe(tokens, points) - before).abs()
    assert (change[:, 0] > 2 * change[:, 1]).all()


def test_losses_reach_the_encoder_and_every_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.solids.images.CHUNK", 12)
    monkeypatch.setattr("training.solids.surfaces.CHUNK", 64)  # a multiple of 64
    monkeypatch.setattr("training.solids.image_encoder._BATCH_SIZE", 4)
    objective = ConditionerObjective(build_conditioner(), tmp_path, num_solids=12)
    losses = objective(torch.Generator().manual_seed(0))
    assert set(losses) == {"field", "surface", "kind", "part"}
    torch.stack(list(losses.values())).sum().backward()
    for module in objective.children():
        gradients = [p.grad.abs().sum() for p in module.parameters() if p.grad is not None]
        assert torch.stack(gradients).sum() > 0
