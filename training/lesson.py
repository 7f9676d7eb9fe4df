"""What a small diffusion transformer is taught: encoded samples, and what it is told of each."""

from typing import Protocol

import torch
from torch import Tensor, nn

from training.scenes.text import Text


class Lesson(Protocol):
    """Samples are known by their row in `latents` `(samples, tokens, channels)`.

    `no_condition` is a single row, what the unconditional branch of guidance is given. `head` reads from the middle of
    the network what `auxiliary_loss` judges; None where there is nothing to read.
    """

    latents: Tensor
    no_condition: Text
    head: nn.Module | None

    def noise(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Where the paths to `clean` `(batch, tokens, channels)` begin: normal noise of its shape."""
        ...

    def conditions(self, rows: list[int], generator: torch.Generator) -> tuple[Text, Tensor]:
        """What these samples are told in training, and whether it is all there is to tell, `(batch,)`."""
        ...

    def full_conditions(self, rows: list[int]) -> Text:
        """All there is to tell of these samples."""
        ...

    def auxiliary_loss(self, output: Tensor, rows: list[int], told: Tensor) -> Tensor:
        """Judges the head's output `(batch, tokens, classes)`, where samples were told all."""
        ...
