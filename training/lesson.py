"""What a tiny diffusion transformer learns: encoded samples and the conditions that describe them."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Condition(NamedTuple):
    """Encoded prompts or images.

    `embeds` is `(batch, tokens, channels)`, `pooled` `(batch, channels)`, `mask` `(batch, tokens)` and true for real
    tokens. FLUX has `pooled`, Qwen-Image has `mask`, Hunyuan3D has neither.
    """

    embeds: Tensor
    pooled: Tensor | None
    mask: Tensor | None

    def rows(self, rows: slice) -> "Condition":
        return self._map(lambda tensor: tensor[rows])

    def join(self, other: "Condition") -> "Condition":
        """Concatenate this batch and `other`, a batch of the same family."""
        pooled = None if self.pooled is None or other.pooled is None else torch.cat((self.pooled, other.pooled))
        mask = None if self.mask is None or other.mask is None else torch.cat((self.mask, other.mask))
        return Condition(torch.cat((self.embeds, other.embeds)), pooled, mask)

    def repeat(self, batch: int) -> "Condition":
        """Expand a single row to a batch."""
        return self._map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Condition":
        pooled = None if self.pooled is None else change(self.pooled)
        return Condition(change(self.embeds), pooled, None if self.mask is None else change(self.mask))


class Lesson(Protocol):
    """Training data of one transformer. A sample is a row of `latents` `(samples, tokens, channels)`.

    `no_condition` has one row: the input of the unconditional guidance branch. `head` reads the hidden states in the
    middle of the network, and `auxiliary_loss` judges its output; `head` is None if the lesson has no auxiliary task.
    """

    latents: Tensor
    no_condition: Condition
    head: nn.Module | None

    def noise(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal noise for each sample of `clean` `(batch, tokens, channels)`, where its flow begins."""
        ...

    def conditions(self, rows: list[int], generator: torch.Generator) -> tuple[Condition, Tensor]:
        """The conditions these samples are trained with, and whether each one is complete, `(batch,)`."""
        ...

    def full_conditions(self, rows: list[int]) -> Condition:
        """The complete conditions of these samples."""
        ...

    def auxiliary_loss(self, output: Tensor, rows: list[int], is_complete: Tensor) -> Tensor:
        """Loss of the head's output `(batch, tokens, classes)`, over the samples whose condition was complete."""
        ...
