import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic.width import narrowed


class Mlp(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16, bias=bias)
        self.last = nn.Linear(16, 6, bias=bias)
        self.register_buffer("offset", torch.randn(6))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(F.gelu(self.first(inputs))) + self.offset
        return outputs


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def mlp(request: pytest.FixtureRequest) -> Mlp:
    torch.manual_seed(0)
    return Mlp(bias=request.param).requires_grad_(False)


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def narrow(mlp: Mlp, hidden: int) -> nn.Module:
    return narrowed(mlp, {"first": hidden}, {"last": hidden})


@pytest.mark.parametrize("hidden", [1, 4, 12, 16])
def test_narrowed_mlp_equals_the_full_one_with_its_other_neurons_masked(mlp: Mlp, inputs: Tensor, hidden: int) -> None:
    mask = (torch.arange(16) < hidden).float()
    masked = mlp.last(F.gelu(mlp.first(inputs)) * mask) + mlp.offset
    torch.testing.assert_close(narrow(mlp, hidden)(inputs), masked, rtol=1e-6, atol=1e-6)


def test_narrowed_mlp_multiplies_matrices_of_the_narrow_size(mlp: Mlp, inputs: Tensor) -> None:
    twin = narrow(mlp, 4)
    first, last = twin.get_submodule("first"), twin.get_submodule("last")
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    assert (first.out_features, last.in_features) == (4, 4)
    assert first.weight.shape == (4, 6)
    assert last.weight.shape == (6, 4)


def test_narrowed_mlp_copies_no_memory(mlp: Mlp) -> None:
    twin = narrow(mlp, 4)
    originals = dict(mlp.named_parameters()) | dict(mlp.named_buffers())
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        assert tensor.data_ptr() == originals[name].data_ptr(), name
        assert tensor.untyped_storage().data_ptr() == originals[name].untyped_storage().data_ptr()


def test_change_of_the_original_shows_in_the_twin(mlp: Mlp, inputs: Tensor) -> None:
    twin = narrow(mlp, 4)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.mul_(2)
    assert torch.equal(twin(inputs), narrow(mlp, 4)(inputs))


def test_narrowing_leaves_the_original_as_it_was(mlp: Mlp, inputs: Tensor) -> None:
    before, expected = {name: id(p) for name, p in mlp.named_parameters()}, mlp(inputs)
    narrow(mlp, 4)
    assert {name: id(p) for name, p in mlp.named_parameters()} == before
    assert (mlp.first.out_features, mlp.last.in_features) == (16, 16)
    assert torch.equal(mlp(inputs), expected)


def test_hook_of_the_original_is_not_called_by_the_twin(mlp: Mlp, inputs: Tensor) -> None:
    twin, called = narrow(mlp, 4), []
    for module in (mlp, mlp.first):
        module.register_forward_hook(lambda *_: called.append(1))
    twin(inputs)
    assert not called
    mlp(inputs)
    assert len(called) == 2
