"""Small images of latents without a decoder: a linear map from a latent pixel's channels to its mean colour.

The map is fitted to a model's own VAE on images drawn here, so any checkpoint has one, and none has to be shipped.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

_NUM_IMAGES = 32
_SHAPES_PER_IMAGE = 6
_SIDE = 64
"""In pixels: 2048 equations a colour, for 17 unknowns, where 8 pixels and 16 channels make a latent pixel, as in the
published VAEs. Of both tiny models, images of twice the side gave previews that were no closer to the results."""


def fitting_images() -> Tensor:
    """`(images, 3, height, width)` in [-1, 1], always the same: gradients under rectangles and soft blobs."""
    rng = torch.Generator().manual_seed(0)
    axis = torch.linspace(-1, 1, _SIDE)
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"))

    def uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(_NUM_IMAGES, *shape, 1, 1, generator=rng) - 1

    slope = (uniform(2) * points).sum(1, keepdim=True)
    images = uniform(3) + uniform(3) * slope
    for shape in range(_SHAPES_PER_IMAGE):
        # From the centre in units of the shape's own half sides.
        offset = (points - uniform(2)) / (0.1 + 0.4 * uniform(2).abs())
        is_rectangle = shape % 2 == 0
        cover = (offset.abs() < 1).all(1, keepdim=True) if is_rectangle else (-offset.square().sum(1, True)).exp()
        images = images.lerp(uniform(3), cover.float())
    return images.clamp(-1, 1)


def fit_colour_map(latents: Tensor, images: Tensor) -> Tensor:
    """Least squares from `latents`, `(images, channels, rows, columns)`, to the mean colours of their pixels.

    The map is `(channels + 1, 3)`, the bias in its last row, in float64 on the CPU; `apply_colour_map` applies it.
    """
    rows, columns = latents.shape[-2:]
    colours = F.adaptive_avg_pool2d(images.double(), (rows, columns)).movedim(1, -1)
    colour_map: Tensor = torch.linalg.lstsq(_with_one(latents).flatten(0, 2), colours.flatten(0, 2)).solution
    return colour_map


def apply_colour_map(colour_map: Tensor, latents: Tensor) -> NDArray[np.uint8]:
    """Pixels `(rows, columns, 3)` of latents `(channels, rows, columns)`."""
    colours = (_with_one(latents) @ colour_map).clamp(-1, 1)
    return ((colours + 1) * 127.5).round().to(torch.uint8).numpy()


def _with_one(latents: Tensor) -> Tensor:
    """Channels last, and a 1 after them; waits for the device."""
    return F.pad(latents.cpu().double().movedim(-3, -1), (0, 1), value=1)
