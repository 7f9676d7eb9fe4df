"""Wrapping a transformer's own blocks as elastic ones: narrow twins, routers beside them, neurons in order."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from models.elastic.router import MLP_WIDTHS, RouterStack
from models.elastic.runner import ElasticBlock, Streams
from models.elastic.width import narrowed, permute_hidden_neurons
from models.errors import WeightsError
from models.weights import RouterWeights


class Anatomy(Protocol):
    """A family's adapter module: how its transformer comes apart. `prologue` differs from family to family."""

    def blocks(self, transformer: Any, /) -> Mapping[str, nn.Module]: ...
    def call_block(self, block: nn.Module, streams: Streams, /) -> tuple[Tensor, Tensor]: ...
    def mlp_layers(self, block: nn.Module, /) -> tuple[nn.Linear, nn.Linear, int]: ...
    def epilogue(self, transformer: Any, streams: Streams, /) -> Tensor: ...
    def rotary_embedding(
        self, transformer: Any, num_text_tokens: int, height: int, width: int, /
    ) -> tuple[Tensor, Tensor]: ...


def elastic_blocks(
    transformer: Any, anatomy: Anatomy, router_weights: RouterWeights | None
) -> tuple[ElasticBlock, ...]:
    """The transformer's blocks with their narrow twins and, if there are any, routers.

    Puts hidden neurons in the routers' order, in place. Raises WeightsError if routers or orders do not fit.
    """
    blocks = anatomy.blocks(transformer)
    routers: list[Any] = [None] * len(blocks)
    if router_weights:
        _check_fit(router_weights.stack, len(blocks), transformer.inner_dim)
        permute_neurons(blocks, router_weights.neuron_orders, anatomy.mlp_layers)
        routers = router_weights.stack.routers
    return tuple(
        ElasticBlock(
            name,
            {width: block if width == 1 else _narrow(block, width, anatomy) for width in MLP_WIDTHS},
            anatomy.call_block,
            router,
        )
        for (name, block), router in zip(blocks.items(), routers, strict=True)
    )


def _check_fit(stack: RouterStack, num_blocks: int, channels: int) -> None:
    found = len(stack.routers), stack.routers[0].trunk.in_features
    if found != (num_blocks, channels):
        raise WeightsError(
            f"the routers are for {found[0]} blocks of {found[1]} channels, the model has {num_blocks} of {channels}"
        )


def _narrow(block: nn.Module, mlp_width: float, anatomy: Anatomy) -> nn.Module:
    """The block with a prefix of its MLP's hidden neurons."""
    first, last, column = anatomy.mlp_layers(block)
    names = {id(module): name for name, module in block.named_modules()}
    hidden = int(first.out_features * mlp_width)
    return narrowed(block, {names[id(first)]: hidden}, {names[id(last)]: column + hidden})


def permute_neurons(
    blocks: Mapping[str, nn.Module],
    orders: Mapping[str, Tensor],
    mlp_layers: Callable[[nn.Module], tuple[nn.Linear, nn.Linear, int]],
) -> None:
    """Put the hidden neurons of the named blocks in these orders, in place. Raises WeightsError if one does not fit."""
    for name, order in orders.items():
        if name not in blocks:
            raise WeightsError(f"neuron_order.{name} is of no block; there are: {', '.join(blocks)}")
        first, last, column = mlp_layers(blocks[name])
        if sorted(order.tolist()) != list(range(first.out_features)):
            raise WeightsError(f"neuron_order.{name} is no order of the block's {first.out_features} hidden neurons")
        permute_hidden_neurons(first, last, order.to(first.weight.device), column)
