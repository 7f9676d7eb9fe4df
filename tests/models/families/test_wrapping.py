"""What every family's blocks are once they are wrapped."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.elastic.router import MLP_WIDTHS
from models.elastic.runner import Streams
from models.errors import WeightsError
from models.families.picture import PictureFamily
from models.families.wrapping import elastic_blocks, permute_neurons
from models.weights import RouterWeights, load_router_weights

TEXT, HEIGHT, WIDTH = 7, 4, 6
CHANNELS, HIDDEN = 32, 128

each_width = pytest.mark.parametrize("width", MLP_WIDTHS)
first_and_last = pytest.mark.parametrize("index", [0, -1], ids=["first block", "last block"])


def streams_of(family: PictureFamily, batch: int = 1) -> Streams:
    rng = torch.Generator().manual_seed(0)
    image, text = (torch.randn(batch, count, CHANNELS, generator=rng) for count in (HEIGHT * WIDTH, TEXT))
    rotary = family.anatomy.rotary_embedding(family.transformer, TEXT, HEIGHT, WIDTH)
    return Streams(image, text, torch.randn(batch, CHANNELS, generator=rng), rotary)


@torch.inference_mode()
def counted_flops(call: Callable[[], object]) -> int:
    # Torch counts attention by its parts; the fused kernel of a CPU it does not know.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@each_width
@first_and_last
@pytest.mark.parametrize("batch", [1, 3])
def test_cost_of_a_block_is_what_torch_counts(family: PictureFamily, index: int, width: float, batch: int) -> None:
    block, streams = family.blocks[index], streams_of(family, batch)
    expected = batch * family.block_costs(16 * HEIGHT, 16 * WIDTH, TEXT)[block.name].at_width(width)
    assert counted_flops(lambda: block.call(block.variants[width], streams)) == pytest.approx(expected, rel=0.01)


@each_width
@first_and_last
def test_narrow_block_multiplies_narrow_matrices(family: PictureFamily, index: int, width: float) -> None:
    block = family.blocks[index]
    first, last, _ = family.anatomy.mlp_layers(block.variants[width])
    column = family.anatomy.mlp_layers(block.variants[1.0])[2]
    assert first.weight.shape == (HIDDEN * width, CHANNELS)
    assert last.weight.shape == (CHANNELS, column + HIDDEN * width)
    sizes: list[int] = []
    handle = first.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-1]))
    block.call(block.variants[width], streams_of(family))
    handle.remove()
    assert sizes == [HIDDEN * width]


@each_width
@first_and_last
@torch.inference_mode()
def test_narrow_block_equals_the_block_with_its_other_neurons_masked(
    family: PictureFamily, index: int, width: float
) -> None:
    block, streams = family.blocks[index], streams_of(family, 2)
    _, last, column = family.anatomy.mlp_layers(block.variants[1.0])
    mask = (torch.arange(column + HIDDEN) < column + HIDDEN * width).float()
    handle = last.register_forward_pre_hook(lambda module, args: (args[0] * mask,))
    masked = block.call(block.variants[1.0], streams)
    handle.remove()
    for ours, expected in zip(block.call(block.variants[width], streams), masked, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_widths_share_the_memory_of_the_checkpoint(family: PictureFamily) -> None:
    for block in family.blocks:
        originals = {p.untyped_storage().data_ptr() for p in block.variants[1.0].parameters()}
        for module in block.variants.values():
            assert {p.untyped_storage().data_ptr() for p in module.parameters()} == originals


def test_full_width_is_the_original_block(family: PictureFamily) -> None:
    blocks = family.anatomy.blocks(family.transformer)
    assert [block.name for block in family.blocks] == list(blocks)
    for block in family.blocks:
        assert block.variants[1.0] is blocks[block.name]


@pytest.fixture
def blocks(stock: DiffusionPipeline, family: PictureFamily) -> dict[str, nn.Module]:
    """Blocks that a wrong order must leave as they are."""
    return dict(family.anatomy.blocks(stock.transformer))


@pytest.mark.parametrize(
    "order", [torch.arange(HIDDEN - 1), torch.zeros(HIDDEN, dtype=torch.int32)], ids=["too short", "with repeats"]
)
def test_order_that_is_none_is_refused_by_name(
    family: PictureFamily, blocks: dict[str, nn.Module], order: Tensor
) -> None:
    name = family.blocks[1].name
    with pytest.raises(WeightsError, match=f"neuron_order.{name} is no order of the block's {HIDDEN} hidden neurons"):
        permute_neurons(blocks, {name: order}, family.anatomy.mlp_layers)


def test_order_of_an_unknown_block_is_refused_with_those_there_are(
    family: PictureFamily, blocks: dict[str, nn.Module]
) -> None:
    with pytest.raises(WeightsError, match=f"neuron_order.block.99 is of no block; there are: {', '.join(blocks)}"):
        permute_neurons(blocks, {"block.99": torch.arange(HIDDEN)}, family.anatomy.mlp_layers)


@first_and_last
@torch.inference_mode()
def test_permuted_neurons_change_only_the_order_of_a_sum(
    family: PictureFamily, directory: Path, permuted_router_weights: Path, index: int
) -> None:
    permuted = load_router_weights(permuted_router_weights / family.model_id, directory)
    assert permuted is not None
    transformer = type(family.transformer).from_pretrained(directory / "transformer")
    block = elastic_blocks(transformer, family.anatomy, RouterWeights(permuted.stack, permuted.neuron_orders))[index]
    streams = streams_of(family, 2)
    first, same = (family.anatomy.mlp_layers(b.variants[1.0])[0].weight for b in (block, family.blocks[index]))
    order = permuted.neuron_orders[block.name]
    assert torch.equal(first, same[order])
    assert not torch.equal(first, same)
    expected = family.blocks[index].call(family.blocks[index].variants[1.0], streams)
    for ours, theirs in zip(block.call(block.variants[1.0], streams), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
