"""Blocks whose weights wait on the host, for devices that do not hold a whole transformer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from models.elastic.runner import ElasticBlock

_Result = TypeVar("_Result")
_ALIGNMENT = 256
"""Bytes. Tensors start where those of CUDA's allocator would, for kernels that read vectors."""
_PINNED_BYTES = 16 * 2**20
"""Torch rounds pinned memory up to powers of two, so that one piece for each block would take up to twice its size."""
_NUM_SLOTS = 2


def offloaded(blocks: Sequence[ElasticBlock], device: torch.device) -> tuple[ElasticBlock, ...]:
    """The blocks with their weights on the host. Their weights must be there, and contiguous.

    A block that runs brings the weights of the next one to `device` while it computes. Blocks that are skipped move
    nothing, unless they change the streams of skipped rows too.
    """
    moves = _Moves(blocks, device)
    return tuple(
        replace(
            block,
            call=partial(moves.run, index, block.call),
            enter=partial(moves.run, index, block.enter) if block.enter else None,
        )
        for index, block in enumerate(blocks)
    )


class _Moves:
    """Two slots on the device, each as large as the largest block. Block number i only ever uses slot i % 2.

    So weights on the device have fixed addresses: the parameters of a block and of its narrow twins are views of its
    slot, made once.
    """

    def __init__(self, blocks: Sequence[ElasticBlock], device: torch.device) -> None:
        self._device = device
        self._backend = torch.get_device_module(device)
        size = max(_packed_size(_tensors(block.variants[1])) for block in blocks)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(_NUM_SLOTS)]
        self._held: list[int | None] = [None] * _NUM_SLOTS
        self._stored = [_move_out(block, self._slots[i % _NUM_SLOTS]) for i, block in enumerate(blocks)]
        self._copying = self._backend.Stream(device)
        self._arrived = [self._backend.Event() for _ in range(_NUM_SLOTS)]
        self._left = [self._backend.Event() for _ in range(_NUM_SLOTS)]

    def run(self, index: int, function: Callable[..., _Result], *arguments: object) -> _Result:
        """Call a function that needs the weights of block `index`, and bring those of the next block meanwhile."""
        slot, computing = index % _NUM_SLOTS, self._backend.current_stream(self._device)
        self._bring(index)
        self._arrived[slot].wait(computing)
        try:
            result = function(*arguments)
        finally:
            self._left[slot].record(computing)
        following = (index + 1) % len(self._stored)
        if following % _NUM_SLOTS != slot:
            self._bring(following)
        return result

    def _bring(self, index: int) -> None:
        slot = index % _NUM_SLOTS
        if self._held[slot] == index:
            return
        self._held[slot] = None  # if a copy fails
        with self._backend.stream(self._copying):
            self._left[slot].wait(self._copying)
            for part, stored in zip(self._slots[slot].split(_PINNED_BYTES), self._stored[index], strict=False):
                part[: len(stored)].copy_(stored, non_blocking=True)
            self._arrived[slot].record(self._copying)
        self._held[slot] = index


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _packed_size(tensors: Sequence[Tensor]) -> int:
    """Bytes, with each tensor's end rounded up."""
    return sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)


def _move_out(block: ElasticBlock, slot: Tensor) -> list[Tensor]:
    """Make all variants' weights views of `slot`. Returns the bytes that belong there, in pieces."""
    packed, homes, offset = torch.zeros(_packed_size(_tensors(block.variants[1])), dtype=torch.uint8), [], 0
    for tensor in _tensors(block.variants[1]):
        assert tensor.is_contiguous()
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        packed[offset : offset + tensor.nbytes] = flat
        homes.append((tensor, slot[offset : offset + tensor.nbytes].view(tensor.dtype)))
        offset += _packed_size([tensor])
    for module, name, tensor in list(_named_tensors(block.variants.values())):
        # A twin's tensor is a part of one of the original's.
        whole, home = next(pair for pair in homes if 0 <= tensor.data_ptr() - pair[0].data_ptr() < pair[0].nbytes)
        first = home.storage_offset() + (tensor.data_ptr() - whole.data_ptr()) // tensor.element_size()
        view = home.as_strided(tensor.shape, tensor.stride(), first)
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(module, name, nn.Parameter(view, requires_grad=False) if is_parameter else view)
    pieces = packed.split(_PINNED_BYTES)
    return [piece.pin_memory() for piece in pieces] if slot.is_cuda else list(pieces)


def _named_tensors(variants: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The owner, the name and the value of each parameter and buffer."""
    for variant in variants:
        for module in variant.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield module, name, tensor
