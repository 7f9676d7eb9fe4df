"""How alike two pictures are, pixel by pixel."""

import torch
from skimage.metrics import structural_similarity
from torch import Tensor


def psnr(pictures: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each pair, `(batch,)`; infinite for equal pictures.

    Both are `(batch, 3, height, width)` in [-1, 1], so the peak is 2.
    """
    _check(pictures, others)
    error = (pictures.double() - others.double()).square().mean((1, 2, 3))
    return (10 * torch.log10(4 / error)).float()


def ssim(pictures: Tensor, others: Tensor) -> Tensor:
    """Structural similarity of each pair, `(batch,)`, at most 1. Both are `(batch, 3, height, width)` in [-1, 1].

    As in Wang et al. 2004: a Gaussian window with a deviation of 1.5 pixels (scikit-image cuts it to 11x11), biased
    covariances, K1 = 0.01 and K2 = 0.03, a data range of 2. Each colour channel is compared by itself, then averaged.
    """
    _check(pictures, others)
    values = [
        structural_similarity(
            one, other, channel_axis=0, data_range=2.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for one, other in zip(pictures.double().cpu().numpy(), others.double().cpu().numpy(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float32)


def _check(pictures: Tensor, others: Tensor) -> None:
    if pictures.shape != others.shape or pictures.ndim != 4:
        raise ValueError(
            f"pictures are {tuple(pictures.shape)} and {tuple(others.shape)}; both must be (batch, 3, height, width)"
        )
