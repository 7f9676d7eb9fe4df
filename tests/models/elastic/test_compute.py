import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.elastic.compute import BlockCost, attention_flops


@pytest.mark.parametrize(("width", "flops"), [(1.0, 130), (0.75, 105), (0.5, 80), (0.25, 55)])
def test_narrow_block_saves_only_of_its_mlp(width: float, flops: float) -> None:
    assert BlockCost(fixed=30, mlp=100).at_width(width) == flops


def test_dense_cost_is_that_of_full_width() -> None:
    cost = BlockCost(fixed=30, mlp=100)
    assert cost.dense == cost.at_width(1.0)


def test_attention_is_counted_as_by_torch() -> None:
    heads = torch.randn(1, 2, 24, 8)
    # Torch counts attention by its parts; the fused kernel of a CPU it does not know.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.scaled_dot_product_attention(heads, heads, heads)
    assert counter.get_total_flops() == attention_flops(24, 16)
