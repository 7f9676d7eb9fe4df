"""What Hunyuan3D-2.1's blocks read besides the two streams and the time embedding. 2.0's blocks read nothing more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from models.elastic.streams import Streams, row_index


@dataclass(frozen=True, slots=True)
class PlainStreams(Streams):
    """`encoder_hidden_states` is the time token alone, `(batch, 1, channels)`.

    `context` `(rows with an image, image tokens, context channels)` is the read-only input of cross-attention, None
    where no row has an image. `context_rows` are the numbers of the rows with an image, on the host, and
    `context_index` the same on the device; both are None where every row has one. `long_skips` maps the number of a
    block to the state that it left for a later block, `(batch, 1 + tokens, channels)`.
    """

    context: Tensor | None
    context_rows: Sequence[int] | None = None
    context_index: Tensor | None = None
    long_skips: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def scored(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        """The shape alone: the time token tells routers nothing that their modulation does not."""
        return (self.hidden_states,), (None,)

    def of_rows(self, rows: Sequence[int], index: Tensor | slice) -> Self:
        """Without the long skips: blocks do not read them, only the hooks do, which run for all rows."""
        part = Streams.of_rows(self, rows, index)
        context, context_rows, context_index = self._context_of(rows, index)
        return replace(part, context=context, context_rows=context_rows, context_index=context_index, long_skips={})

    def _context_of(
        self, rows: Sequence[int], index: Tensor | slice
    ) -> tuple[Tensor | None, Sequence[int] | None, Tensor | None]:
        """`context`, `context_rows` and `context_index` of some rows."""
        if self.context is None:
            return None, [], None
        if self.context_rows is None:
            return self.context[index], None, None
        places = {row: place for place, row in enumerate(self.context_rows)}
        having = [position for position, row in enumerate(rows) if row in places]
        if not having:
            return None, [], None
        device = self.context.device
        context = self.context[row_index([places[rows[position]] for position in having], device)]
        if len(having) == len(rows):
            return context, None, None
        return context, having, row_index(having, device)
