"""Peak signal-to-noise ratio. Structural similarity, the `quality` of image models, is `Engine.similarity`."""

import torch
from torch import Tensor


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair, `(batch,)`; infinite for equal images.

    Both are `(batch, 3, height, width)` in [-1, 1], so the peak is 2. Raises ValueError for other or unequal shapes.
    """
    if images.shape != others.shape or images.ndim != 4:
        raise ValueError(
            f"images are {tuple(images.shape)} and {tuple(others.shape)}; both must be (batch, 3, height, width)"
        )
    error = (images.double() - others.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / error)).float()
