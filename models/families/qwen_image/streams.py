"""What Qwen-Image's blocks read besides the two streams and the time embedding."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from models.elastic.streams import Streams


@dataclass(frozen=True, slots=True)
class QwenImageStreams(Streams):
    """Prompts in a batch are padded to the longest.

    `image_rotary_emb` `(image tokens, head channels / 2)` and `text_rotary_emb` `(text tokens, head channels / 2)` are
    complex position factors for all rows. `encoder_hidden_states_mask` `(batch, text tokens)` is true for real tokens,
    and `text_lengths` counts them by row, on the host. Both are None where no prompt is padded.

    Some transformers modulate the tokens of pictures, where `is_picture` `(image tokens,)` is 1, with `picture_temb`
    `(batch, channels)`.
    """

    image_rotary_emb: Tensor
    text_rotary_emb: Tensor
    encoder_hidden_states_mask: Tensor | None = None
    text_lengths: Sequence[int] | None = None
    picture_temb: Tensor | None = None
    is_picture: Tensor | None = None

    @property
    def scored(self) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
        return (self.encoder_hidden_states, self.hidden_states), (self.encoder_hidden_states_mask, None)

    def of_rows(self, rows: Sequence[int], index: Tensor | slice) -> Self:
        """Cuts padding that none of these rows needs, which saves time.

        Where all have one length the mask goes too: attention has faster kernels without one.
        """
        part = Streams.of_rows(self, rows, index)
        if self.picture_temb is not None:
            part = replace(part, picture_temb=self.picture_temb[index])
        if self.text_lengths is None or self.encoder_hidden_states_mask is None:
            return part
        lengths = [self.text_lengths[row] for row in rows]
        longest, is_padded = max(lengths), min(lengths) < max(lengths)
        return replace(
            part,
            encoder_hidden_states=part.encoder_hidden_states[:, :longest],
            text_rotary_emb=self.text_rotary_emb[:longest],
            encoder_hidden_states_mask=self.encoder_hidden_states_mask[index, :longest] if is_padded else None,
            text_lengths=lengths if is_padded else None,
        )
