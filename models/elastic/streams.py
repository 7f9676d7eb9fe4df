"""What flows from block to block, for all rows of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models.elastic.row import Row


@dataclass(frozen=True, slots=True)
class Streams:
    """What flows from block to block.

    `hidden_states` is `(batch, image tokens, channels)`, `encoder_hidden_states` `(batch, text tokens, channels)`,
    `temb` `(batch, channels)`; `image_rotary_emb` holds the position factors shared by all rows, None where there are
    none. `encoder_hidden_states_mask` `(batch, text tokens)` is true for real text tokens, None where all are. Families
    that pad texts have the image's and the text's position factors apart, `image_rotary_emb` being the two.

    In families whose blocks look at something that they do not change, `context` `(rows with context, context tokens,
    context channels)` is that, and the tokens of `encoder_hidden_states` tell routers nothing. `context_rows` are the
    numbers of those rows, None where all have context. `long_skips` maps the number of a block to what it left for a
    later one, `(batch, tokens, channels)`.
    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor
    temb: Tensor
    image_rotary_emb: tuple[Tensor, Tensor] | None = None
    encoder_hidden_states_mask: Tensor | None = None
    context: Tensor | None = None
    context_rows: Tensor | None = None
    long_skips: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def scored(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """The streams that routers read, and their masks."""
        if self.context is not None:
            return (self.hidden_states,), (None,)
        return (self.encoder_hidden_states, self.hidden_states), (self.encoder_hidden_states_mask, None)

    def of_rows(self, where: Tensor, chosen: Sequence[int], rows: Sequence[Row]) -> "Streams":
        """The streams of the `chosen` of all `rows` alone; what they left for later blocks is not needed.

        `where` are their numbers on the device. Padding that none of them needs is cut off, and with it the mask where
        all are of one length: it costs time, and attention's fastest kernels.
        """
        context, context_rows = self._context_of(chosen, rows)
        part = replace(
            self,
            hidden_states=self.hidden_states[where],
            encoder_hidden_states=self.encoder_hidden_states[where],
            temb=self.temb[where],
            context=context,
            context_rows=context_rows,
        )
        if self.encoder_hidden_states_mask is None:
            return part
        assert self.image_rotary_emb is not None
        known = [length for i in chosen if (length := rows[i].num_text_tokens) is not None]
        longest = max(known)
        image_factors, text_factors = self.image_rotary_emb
        return replace(
            part,
            encoder_hidden_states=part.encoder_hidden_states[:, :longest],
            image_rotary_emb=(image_factors, text_factors[:longest]),
            encoder_hidden_states_mask=None
            if min(known) == longest
            else self.encoder_hidden_states_mask[where, :longest],
        )

    def _context_of(self, chosen: Sequence[int], rows: Sequence[Row]) -> tuple[Tensor | None, Tensor | None]:
        if self.context is None:
            return None, None
        having = [i for i, row in enumerate(rows) if row.has_context]
        places = {i: place for place, i in enumerate(having)}
        looking = [position for position, i in enumerate(chosen) if i in places]
        if not looking:
            return None, None
        device = self.context.device
        context = self.context[row_index([places[chosen[position]] for position in looking], device)]
        return context, None if len(looking) == len(chosen) else row_index(looking, device)


def row_index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers on the device. From pinned memory, since an ordinary copy would wait for all that was queued."""
    return torch.tensor(rows, pin_memory=device.type == "cuda").to(device, non_blocking=True)
