"""Wraps a transformer's own blocks as elastic blocks: narrow twins, and routers beside them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from models.elastic.plan import MLP_WIDTHS
from models.elastic.router import RouterStack
from models.elastic.runner import ElasticBlock
from models.elastic.streams import Streams
from models.elastic.width import narrowed
from models.errors import WeightsError
from models.weights import RouterWeights


class Mlp(NamedTuple):
    """The two layers of an MLP that may be narrowed.

    Its hidden neurons are the outputs of `first` from `row` on and the inputs of `last` from `column` on. Some families
    have attention's channels before them.
    """

    first: nn.Linear
    last: nn.Linear
    row: int = 0
    column: int = 0

    @property
    def num_hidden(self) -> int:
        return self.first.out_features - self.row


class Adapter(Protocol):
    """A family's adapter module, which takes its transformer apart. It also has a `prologue` with its own arguments.

    `channels` is the width of the blocks. `mlps` are the MLPs of a block that may be narrowed, by name; the name of a
    single one is empty. `call_block` returns the text stream, then the image stream; `epilogue` the velocity.
    """

    def channels(self, transformer: Any, /) -> int: ...
    def blocks(self, transformer: Any, /) -> Mapping[str, nn.Module]: ...
    def call_block(self, block: nn.Module, streams: Streams, /) -> tuple[Tensor, Tensor]: ...
    def mlps(self, block: nn.Module, /) -> Mapping[str, Mlp]: ...
    def epilogue(self, transformer: Any, streams: Streams, /) -> Tensor: ...


@runtime_checkable
class LongSkipAdapter(Protocol):
    """Extra hooks for adapters with long skips, where blocks leave their state for later blocks.

    The hooks run before and after block `index`, for every row, whatever its plan. None: the block has no such hook.
    """

    def enter_hook(self, transformer: Any, index: int, /) -> Callable[[Streams], Streams] | None: ...
    def leave_hook(self, transformer: Any, index: int, /) -> Callable[[Streams], Streams] | None: ...


def elastic_blocks(
    transformer: Any, adapter: Adapter, router_weights: RouterWeights | None
) -> tuple[ElasticBlock, ...]:
    """The transformer's blocks with their narrow twins and, if there are any, their routers.

    Raises WeightsError if routers do not fit.
    """
    blocks = adapter.blocks(transformer)
    routers: list[Any] = [None] * len(blocks)
    if router_weights:
        _check_fit(router_weights.stack, len(blocks), adapter.channels(transformer))
        routers = [router.fused() for router in router_weights.stack.routers]
    return tuple(
        ElasticBlock(
            name,
            {width: block if width == 1 else _narrow(block, width, adapter) for width in MLP_WIDTHS},
            adapter.call_block,
            router,
            adapter.enter_hook(transformer, index) if isinstance(adapter, LongSkipAdapter) else None,
            adapter.leave_hook(transformer, index) if isinstance(adapter, LongSkipAdapter) else None,
        )
        for index, ((name, block), router) in enumerate(zip(blocks.items(), routers, strict=True))
    )


def _check_fit(stack: RouterStack, num_blocks: int, channels: int) -> None:
    found = len(stack.routers), stack.routers[0].trunk.in_features
    if found != (num_blocks, channels):
        raise WeightsError(
            f"the routers are for {found[0]} blocks of {found[1]} channels, the model has {num_blocks} of {channels}"
        )


def _narrow(block: nn.Module, mlp_width: float, adapter: Adapter) -> nn.Module:
    """A twin of the block whose MLPs keep a prefix of their hidden neurons."""
    names = {id(module): name for name, module in block.named_modules()}
    keep_rows, keep_columns = {}, {}
    for mlp in adapter.mlps(block).values():
        kept = int(mlp.num_hidden * mlp_width)
        keep_rows[names[id(mlp.first)]] = mlp.row + kept
        keep_columns[names[id(mlp.last)]] = mlp.column + kept
    return narrowed(block, keep_rows, keep_columns)


def mlp_name(block: str, part: str) -> str:
    """The name of a block's MLP in files of neuron orders."""
    return f"{block}.{part}" if part else block
