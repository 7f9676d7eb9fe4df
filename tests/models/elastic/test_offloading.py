from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.curve import EXACT, CurvePoint
from models.elastic.offloading import offloaded
from models.elastic.runner import ElasticBlock
from models.elastic.streams import Streams
from models.elastic.width import narrowed
from models.engine import Engine
from models.families.family import Family
from models.load_options import LoadOptions, Offload, Weights
from models.request import GenerationRequest
from models.rules.router import RouterPolicy
from models.state import DenoiseState
from models.weights import CheckpointTraits, load_router_weights
from tests.fixtures.kinds import Kind

MIXED = CurvePoint(RouterPolicy(0.5, 0.2, 2, width_bias=1.0), 0.5, 0.6, 0.8, 0.85)


def test_blocks_on_the_host_give_what_blocks_on_the_device_give(
    kind: Kind,
    directory: Path,
    router_weights: Path,
    engine: Engine,
    ask: Callable[..., GenerationRequest],
    guided: Callable[..., dict[str, Any]],
    denoise: Callable[..., DenoiseState],
) -> None:
    states = []
    for offload in (Offload.NONE, Offload.LAYERS):
        options = LoadOptions(offload, Weights.FLOAT8)
        routers = load_router_weights(router_weights / kind.model, directory)
        family: Family = kind.family.load(directory, "cpu", torch.float32, routers, CheckpointTraits(), options)
        if options.offloads_layers:
            family.keep_blocks_on_host(torch.device("cpu"))
        loaded = Engine({kind.model: family}, engine.cards)
        states += [denoise(loaded, ask(num_inference_steps=3, **guided()), point) for point in (EXACT, MIXED)]
    for here, there in zip(states[:2], states[2:], strict=True):
        assert [row.trace for row in here.rows] == [row.trace for row in there.rows]
        torch.testing.assert_close(there.latents, here.latents, rtol=1e-5, atol=1e-5)


class Arrivals(TorchDispatchMode):
    """Counts the bytes that come into the slots."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "copy_" in str(func) and args[0].dtype is torch.uint8:
            self.total += args[1].nbytes
        return func(*args, **(kwargs or {}))


@pytest.fixture
def arrivals() -> Arrivals:
    return Arrivals()  # type: ignore[no-untyped-call]  # torch leaves it without types


def linear_blocks(*sizes: int) -> list[ElasticBlock]:
    """Blocks of one matrix, each with a narrow twin that has the first half of its rows."""
    torch.manual_seed(0)
    blocks = [nn.ModuleDict({"linear": nn.Linear(8, size)}).requires_grad_(False) for size in sizes]

    def call(block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        return streams.encoder_hidden_states, block.get_submodule("linear")(streams.hidden_states)

    return [
        ElasticBlock(str(i), {0.5: narrowed(block, {"linear": size // 2}, {}), 1.0: block}, call, None)
        for i, (block, size) in enumerate(zip(blocks, sizes, strict=True))
    ]


def streams_of(value: float) -> Streams:
    return Streams(torch.full((1, 2, 8), value), torch.zeros(1, 1, 8), torch.zeros(1, 8))


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4])
def test_any_order_of_blocks_and_widths_uses_their_own_weights(num_blocks: int) -> None:
    sizes = [128 + 2 * i for i in range(num_blocks)]
    here, there = linear_blocks(*sizes), offloaded(linear_blocks(*sizes), torch.device("cpu"))
    order = torch.randint(num_blocks, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    for number, index in enumerate([*range(num_blocks), *order]):
        for width in (0.5, 1.0):
            ours, full = (
                blocks[index].call(blocks[index].variants[width], streams_of(float(number)))[1]
                for blocks in (there, here)
            )
            assert torch.equal(ours, full)


def test_two_blocks_fit_on_the_device_and_twins_are_views() -> None:
    blocks = offloaded(linear_blocks(128, 256, 64), torch.device("cpu"))
    weights = [[variant.get_parameter("linear.weight") for variant in block.variants.values()] for block in blocks]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for pair in weights for t in pair}
    assert set(storages.values()) == {256 * 8 * 4 + 256 * 4}
    assert len(storages) == 2
    assert all(narrow.data_ptr() == full.data_ptr() for narrow, full in weights)


def test_skipped_block_moves_nothing_and_a_running_one_brings_the_next(arrivals: Arrivals) -> None:
    blocks = offloaded(linear_blocks(128, 128, 128, 128), torch.device("cpu"))
    size = 128 * 8 * 4 + 128 * 4
    moved = []
    for index in (0, 1, 3):  # block 2 is skipped, after block 1 has brought it
        with arrivals:
            blocks[index].call(blocks[index].variants[1.0], streams_of(1.0))
        moved.append(arrivals.total / size)
    assert moved == [2, 3, 5]
