"""What FLUX's blocks read besides the two streams and the time embedding."""

from dataclasses import dataclass

from torch import Tensor

from models.elastic.streams import Streams


@dataclass(frozen=True, slots=True)
class FluxStreams(Streams):
    """`image_rotary_emb` holds cosines and sines, `(text tokens + image tokens, head channels)` each, for all rows.

    Prompts are never padded here: the pipeline pads every prompt to one length, and FLUX reads that padding.
    """

    image_rotary_emb: tuple[Tensor, Tensor]
