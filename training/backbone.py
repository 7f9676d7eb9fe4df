"""The parts of a transformer that training calls. All other training code is independent of the family.

Times are noise levels: 1 is noise, 0 is data. Velocities point from data to noise.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from models.elastic.streams import Streams
from models.families.wrapping import Mlp
from training.lesson import Condition


class Backbone(Protocol):
    """A transformer in its parts. `transformer` is the whole module, `channels` its width.

    `has_guidance_embedding` says whether the guidance scale is an input of the transformer. If so, training distils
    guidance into it.
    """

    @property
    def transformer(self) -> nn.Module: ...
    @property
    def channels(self) -> int: ...
    @property
    def has_guidance_embedding(self) -> bool: ...
    @property
    def blocks(self) -> Mapping[str, nn.Module]: ...

    def prologue(self, latents: Tensor, timestep: Tensor, guidance: Tensor, condition: Condition) -> Streams:
        """The first block's input, from latents `(batch, tokens, channels)`, `timestep` and `guidance` `(batch,)`."""
        ...

    def call_block(self, block: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        """Run a block. Returns `encoder_hidden_states`, then `hidden_states`."""
        ...

    def enter(self, index: int, streams: Streams) -> Streams:
        """Apply the work before block `index`, such as long skips. It runs for skipped blocks too."""
        ...

    def leave(self, index: int, streams: Streams) -> Streams:
        """Apply the work after block `index`. It runs for skipped blocks too."""
        ...

    def mlps(self, block: nn.Module) -> Mapping[str, Mlp]:
        """The MLPs of a block that can be narrowed, by name."""
        ...

    def epilogue(self, streams: Streams) -> Tensor:
        """The velocity `(batch, tokens, channels)` from the last block's output."""
        ...

    def compile_blocks(self) -> None: ...


def after_block(backbone: Backbone, block: nn.Module, streams: Streams) -> Streams:
    """Run one block on `streams`."""
    encoder_hidden_states, hidden_states = backbone.call_block(block, streams)
    return replace(streams, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states)


def run_all(backbone: Backbone, streams: Streams) -> Tensor:
    """Run every block on `streams` and return the velocity."""
    for i, block in enumerate(backbone.blocks.values()):
        streams = backbone.leave(i, after_block(backbone, block, backbone.enter(i, streams)))
    return backbone.epilogue(streams)
