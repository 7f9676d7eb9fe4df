"""Blocks as compiled graphs: one for each kind of block and MLP width, and of these one for a single row, one for more.

Sizes of pictures, lengths of prompts and numbers of rows above one are variables of a graph. Weights are its inputs, so
all blocks of a kind share it, nothing is copied, and a weight that changes takes effect.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import lookup_backend
from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported
from torch._inductor import config as inductor_config
from torch.fx.experimental import _config as symbolic_shapes
from tqdm import tqdm

from models.elastic.runner import ElasticBlock
from models.elastic.streams import Streams, row_index
from models.errors import CompilerError

logger = logging.getLogger(__name__)

CallBlock = Callable[[nn.Module, Streams], tuple[Tensor, Tensor]]

_NUM_WARM_ROWS = 4
"""How many rows of a batch are combined to warm up: two requests of two guidance branches."""

# Functions that are compiled apart look only through their own graphs at a call, and have a limit of their own. (Stubs
# of torch lack the argument.)
_compile_apart: Callable[..., Any] = partial(torch.compile, isolate_recompiles=True)


def check_compiler(device: str) -> None:
    """Compile a trivial function. Raises CompilerError, with what is missing, if that is not possible on `device`."""

    def negated(tensor: Tensor) -> Tensor:
        return -tensor

    try:
        # A graph from the cache on disk would need no compiler.
        with inductor_config.patch(fx_graph_cache=False):
            _compile_apart(negated)(torch.zeros(2, device=device))
    except Exception as error:  # torch raises what it likes: missing compilers, headers, Triton
        raise CompilerError(
            f"blocks can't be compiled here: {' '.join(str(error).split())[:300]}; install what is missing, or set "
            "ELASTIC_COMPILE=false"
        ) from error


class BlockCompiler:
    """Compiles the blocks of one model. Used by the thread that steps.

    Graphs that `warm_up` did not make are compiled when they are first needed. Blocks that do not fit into one graph,
    such as those that wait for the device, run uncompiled; the log says so.
    """

    def __init__(self, blocks: Sequence[ElasticBlock], call: CallBlock) -> None:
        self._call = call
        self._new: list[str] = []
        self._functions: list[CallBlock] = []
        self._numbers: dict[nn.Module, int] = {}  # those of their functions
        numbers: dict[Hashable, int] = {}
        for block in blocks:
            for module in block.variants.values():
                structure = _structure(module)
                if structure not in numbers:
                    numbers[structure] = len(self._functions)
                    self._functions.append(self._compile(block.name.partition(".")[0]))
                self._numbers[module] = numbers[structure]
        self.blocks = tuple(replace(block, call=self._run) for block in blocks)
        """The blocks with a `call` that runs graphs."""

    def take_new(self) -> tuple[str, ...]:
        """The kind of each graph that was compiled since the last call: the first part of its blocks' names."""
        new, self._new = tuple(self._new), []
        return new

    @torch.inference_mode()
    def warm_up(self, streams: Streams, widths: Sequence[float]) -> None:
        """Compile the graphs for one row and for several, at these MLP widths. Shows a progress bar on terminals.

        `streams` enter the first block. Their rows should differ in what is optional, such as padding.
        """
        count = min(len(streams.hidden_states), _NUM_WARM_ROWS)
        groups = [rows for size in range(1, count + 1) for rows in combinations(range(count), size)]
        parts = [streams.of_rows(rows, row_index(rows, streams.hidden_states.device)) for rows in groups]
        variants = [block.variants[width] for block in self.blocks for width in widths]
        modules = {self._numbers[module]: module for module in variants}
        # Otherwise sizes that happen to be equal, such as those of two streams, would have to be equal ever after.
        with (
            symbolic_shapes.patch(use_duck_shape=False),  # type: ignore[attr-defined]  # installed at import
            tqdm(total=len(modules), desc="compile", disable=None) as bar,
        ):
            for module in modules.values():
                for part in parts:
                    self._run(module, part)
                bar.update(1)

    def _run(self, module: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        hidden_states, text = _dense(streams.hidden_states), _dense(streams.encoder_hidden_states)
        streams = replace(streams, hidden_states=hidden_states, encoder_hidden_states=text)
        number = self._numbers[module]
        try:
            return self._functions[number](module, streams)
        except (Unsupported, FailOnRecompileLimitHit) as error:
            reason = str(error).partition("\n")[0]
            logger.warning("blocks such as %s run uncompiled: %s", type(module).__name__, reason)
            self._functions[number] = self._call
            return self._call(module, streams)

    def _compile(self, kind: str) -> CallBlock:
        inductor: Any = lookup_backend("inductor")

        def counting(graph: Any, inputs: Sequence[Any]) -> Any:
            compiled = inductor(graph, inputs)
            self._new.append(kind)
            return compiled

        def run(module: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
            text, image = self._call(module, streams)
            return text.contiguous(), image.contiguous()

        compiled: CallBlock = _compile_apart(run, backend=counting, fullgraph=True, dynamic=True)
        return compiled


def _structure(module: nn.Module) -> Hashable:
    """Equal for modules that can share graphs: of one kind of block and one width."""
    return type(module), *((name, weight.shape) for name, weight in module.named_parameters())


def _dense(tensor: Tensor) -> Tensor:
    """The same values with the strides that follow from the shape, for which graphs are made.

    A part of one row counts as contiguous, whatever its stride between rows.
    """
    return tensor[0].contiguous()[None] if len(tensor) == 1 else tensor.contiguous()
