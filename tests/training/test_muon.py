import pytest
import torch
from torch import nn

from training.muon import Muon, orthogonalised


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"], autouse=True)
def is_in_bfloat16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr("training.muon.HAS_FAST_BFLOAT16", request.param)
    return bool(request.param)


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)], ids=str)
def test_steps_equal_those_of_torch(shape: tuple[int, int], is_in_bfloat16: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=rng)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = Muon([ours], lr=0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=rng)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    # Three steps move a value by about 0.05. Torch computes them with 8 significant bits.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 if is_in_bfloat16 else 8e-3)
    assert (ours - start).abs().mean() > 0.03


def test_singular_values_come_near_one() -> None:
    rng = torch.Generator().manual_seed(1)
    matrix = torch.randn(16, 48, generator=rng) * torch.logspace(0, 1.5, 16)[:, None]
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_matrix_without_gradient_stays_unchanged() -> None:
    matrix = nn.Parameter(torch.ones(2, 2))
    Muon([matrix], lr=0.1).step()
    assert torch.equal(matrix, torch.ones(2, 2))
