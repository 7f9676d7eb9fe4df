"""What flows from block to block, for all rows of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from models.elastic.host import to_device


@dataclass(frozen=True, slots=True)
class Streams:
    """The two streams that blocks change, and the time embedding. A family adds the other inputs of its blocks.

    `hidden_states` is `(batch, tokens, channels)`: the image or the shape. `encoder_hidden_states` is
    `(batch, text tokens, channels)`: the text, or what the family has in its place. `temb` is `(batch, channels)`.
    `uploaded` has the row numbers that `indices` copied to the device in this step.
    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    temb: Tensor
    uploaded: dict[tuple[int, ...], Tensor] = field(default_factory=dict, kw_only=True, repr=False, compare=False)

    @property
    def text_lengths(self) -> Sequence[int] | None:
        """How many tokens of `encoder_hidden_states` are real, by row, known on the host. None: nothing is padded."""
        return None

    @property
    def scored(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """The streams that routers read, and their masks, `(batch, tokens)` each; None where all tokens are real."""
        return (self.encoder_hidden_states, self.hidden_states), (None, None)

    def indices(self, groups: Sequence[Sequence[int]]) -> list[Tensor | slice]:
        """An index of each group of rows, in ascending order, for `of_rows`.

        Adjacent rows have a slice, which costs no copy. Other groups share one copy to the device, and each is copied
        once in a step.
        """
        keys = [tuple(group) for group in groups]
        missing = [key for key in keys if not _is_adjacent(key) and key not in self.uploaded]
        if missing:
            joined = row_index([row for key in missing for row in key], self.hidden_states.device)
            self.uploaded.update(zip(missing, joined.split([len(key) for key in missing]), strict=True))
        return [slice(key[0], key[-1] + 1) if _is_adjacent(key) else self.uploaded[key] for key in keys]

    def of_rows(self, rows: Sequence[int], index: Tensor | slice) -> Self:
        """The streams of these rows alone, in this order. `index` holds the same numbers on the device."""
        return replace(
            self,
            hidden_states=self.hidden_states[index],
            encoder_hidden_states=self.encoder_hidden_states[index],
            temb=self.temb[index],
        )


def row_index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers on the device."""
    return to_device(torch.tensor(rows), device)


def _is_adjacent(rows: Sequence[int]) -> bool:
    return rows[-1] - rows[0] == len(rows) - 1
