"""What flows from block to block, for all rows of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Streams:
    """The two streams that blocks change, and the time embedding. A family adds the other inputs of its blocks.

    `hidden_states` is `(batch, tokens, channels)`: the image or the shape. `encoder_hidden_states` is
    `(batch, text tokens, channels)`: the text, or what the family has in its place. `temb` is `(batch, channels)`.
    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    temb: Tensor

    @property
    def text_lengths(self) -> Sequence[int] | None:
        """How many tokens of `encoder_hidden_states` are real, by row, known on the host. None: nothing is padded."""
        return None

    @property
    def scored(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """The streams that routers read, and their masks, `(batch, tokens)` each; None where all tokens are real."""
        return (self.encoder_hidden_states, self.hidden_states), (None, None)

    def of_rows(self, rows: Sequence[int], index: Tensor) -> Self:
        """The streams of these rows alone, in this order. `index` holds the same numbers on the device."""
        return replace(
            self,
            hidden_states=self.hidden_states[index],
            encoder_hidden_states=self.encoder_hidden_states[index],
            temb=self.temb[index],
        )


def row_index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers on the device. Copied from pinned memory: an ordinary copy would wait for all queued work."""
    return torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)
