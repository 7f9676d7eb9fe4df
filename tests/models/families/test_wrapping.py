"""What every family's blocks are once they are wrapped."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.elastic.plan import MLP_WIDTHS
from models.elastic.streams import Streams
from models.families.family import Family

CHANNELS, HIDDEN = 32, 128

StreamsOf = Callable[..., Streams]

each_width = pytest.mark.parametrize("width", MLP_WIDTHS)
first_and_last = pytest.mark.parametrize("index", [0, -1], ids=["first block", "last block"])


@torch.inference_mode()
def counted_flops(call: Callable[[], object]) -> int:
    # Torch counts attention by its parts; the fused kernel of a CPU it does not know.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@each_width
@first_and_last
@pytest.mark.parametrize("batch", [1, 3])
def test_cost_of_a_block_is_what_torch_counts(
    kind: Any, family: Family, streams_of: StreamsOf, index: int, width: float, batch: int
) -> None:
    block, streams = family.blocks[index], streams_of(family, batch)
    cost = kind.block_costs(family)[block.name]
    counted = counted_flops(lambda: block.call(block.variants[width], streams))
    assert counted == pytest.approx(batch * cost.at_width(width), rel=0.01)


@each_width
@first_and_last
def test_narrow_block_multiplies_narrow_matrices(
    family: Family, streams_of: StreamsOf, index: int, width: float
) -> None:
    block = family.blocks[index]
    originals, sizes = family.adapter.mlps(block.variants[1.0]), []
    for name, (first, last, row, column) in family.adapter.mlps(block.variants[width]).items():
        assert (row, column) == originals[name][2:]
        assert first.weight.shape == (row + HIDDEN * width, CHANNELS)
        assert last.weight.shape == (CHANNELS, column + HIDDEN * width)
        last.register_forward_pre_hook(lambda module, args, column=column: sizes.append(args[0].shape[-1] - column))
    block.call(block.variants[width], streams_of(family))
    for mlp in family.adapter.mlps(block.variants[width]).values():
        mlp.last._forward_pre_hooks.clear()
    assert set(sizes) == {HIDDEN * width}


@each_width
@first_and_last
@torch.inference_mode()
def test_narrow_block_equals_the_block_with_its_other_neurons_masked(
    family: Family, streams_of: StreamsOf, index: int, width: float
) -> None:
    block, streams = family.blocks[index], streams_of(family, 2)
    handles = []
    for mlp in family.adapter.mlps(block.variants[1.0]).values():
        mask = (torch.arange(mlp.column + HIDDEN) < mlp.column + HIDDEN * width).float()
        handles.append(mlp.last.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,)))
    masked = block.call(block.variants[1.0], streams)
    for handle in handles:
        handle.remove()
    for ours, expected in zip(block.call(block.variants[width], streams), masked, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_widths_share_the_memory_of_the_checkpoint(family: Family) -> None:
    for block in family.blocks:
        originals = {p.untyped_storage().data_ptr() for p in block.variants[1.0].parameters()}
        for module in block.variants.values():
            assert {p.untyped_storage().data_ptr() for p in module.parameters()} == originals


def test_full_width_is_the_original_block(family: Family) -> None:
    blocks = family.adapter.blocks(family.transformer)
    assert [block.name for block in family.blocks] == list(blocks)
    for block in family.blocks:
        assert block.variants[1.0] is blocks[block.name]
