"""The eight symmetries of the square, for images and for the points they show.

A symmetry is a number from 0 to 7: bit 0 mirrors x, bit 1 mirrors y, and bit 2 then transposes the image. The camera
sees a solid turned by `turn_points` as its image turned by `turn_images`.
"""

import torch
from torch import Tensor

NUM_SYMMETRIES = 8


def turn_images(images: Tensor, symmetries: Tensor) -> Tensor:
    """Apply symmetry `symmetries[i]` to image i of `(batch, channels, side, side)`."""
    turned = []
    for image, symmetry in zip(images, symmetries.tolist(), strict=True):
        image = image.flip(-1) if symmetry & 1 else image
        image = image.flip(-2) if symmetry & 2 else image
        turned.append(image.mT if symmetry & 4 else image)
    return torch.stack(turned)


def turn_points(points: Tensor, symmetries: Tensor) -> Tensor:
    """Apply symmetry `symmetries[i]` to the points or vectors of row i of `(batch, points, 3)`."""
    x, y, z = points.unbind(-1)
    x = torch.where((symmetries & 1 > 0)[:, None], -x, x)
    y = torch.where((symmetries & 2 > 0)[:, None], -y, y)
    is_swapped = (symmetries & 4 > 0)[:, None]
    return torch.stack((torch.where(is_swapped, -y, x), torch.where(is_swapped, -x, y), z), -1)
