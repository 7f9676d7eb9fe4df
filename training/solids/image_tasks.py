"""The tasks that teach the image encoder, each with a head that is discarded after training.

- `SurfaceHead` predicts position and normal of the surface in each cell of a patch.
- `PartHead` predicts the part that this surface belongs to, hidden sides included.
- `Probe` predicts the field at any point, from all tokens.
"""

import torch
from torch import Tensor, nn

from models.families.hunyuan3d.shape_vae import GeometryDecoder, fourier_features
from training.solids.images import CELLS, SIDE
from training.solids.parts import NUM_KINDS, NUM_VECTORS, PartDescriptions
from training.solids.shape_vae import compare, pass_on
from training.solids.symmetry import turn_images, turn_points

CHANNELS = 192
PATCH = 14
_CELLS_OF_PATCH = (CELLS * PATCH // SIDE) ** 2
_NUM_FREQUENCIES = 6


class SurfaceHead(nn.Module):
    """Predicts position and normal in each cell of a patch: `(batch, patches, cells, 6)` from the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, 6 * _CELLS_OF_PATCH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens[:, 1:]).unflatten(-1, (_CELLS_OF_PATCH, 6))


class PartHead(nn.Module):
    """Predicts the part that each cell of a patch shows.

    Returns logits of its kind `(batch, patches, cells, NUM_KINDS)` and its vectors
    `(batch, patches, cells, NUM_VECTORS, 3)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, _CELLS_OF_PATCH * (NUM_KINDS + 3 * NUM_VECTORS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        predicted = self.linear(tokens[:, 1:]).unflatten(-1, (_CELLS_OF_PATCH, -1))
        kinds, vectors = predicted.split((NUM_KINDS, 3 * NUM_VECTORS), dim=-1)
        return kinds, vectors.unflatten(-1, (NUM_VECTORS, 3))


def part_targets(part_maps: Tensor, parts: PartDescriptions, symmetries: Tensor) -> tuple[Tensor, Tensor]:
    """The targets of `PartHead`: kinds `(batch, patches, cells)` and vectors `(batch, patches, cells, NUM_VECTORS, 3)`.

    `part_maps` are maps of `training_part_maps`, which this function turns by `symmetries`.
    """
    slots = _cells(part_maps, symmetries)[..., 0].long()
    vectors = turn_points(parts.vectors.flatten(1, 2), symmetries).view_as(parts.vectors)
    # The rows of the matrices are turned. Turn their columns too.
    columns = vectors[:, :, 1:4].mT
    vectors[:, :, 1:4] = turn_points(columns.flatten(1, 2), symmetries).view_as(columns).mT
    rows = torch.arange(len(symmetries))[:, None, None]
    return parts.kinds[rows, slots], vectors[rows, slots]


def _cells(maps: Tensor, symmetries: Tensor) -> Tensor:
    """Turn maps `(batch, channels, CELLS, CELLS)` and group them by patch: `(batch, patches, cells, channels)`."""
    side = SIDE // PATCH
    cells = turn_images(maps, symmetries).unflatten(-1, (side, -1)).unflatten(-3, (side, -1))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def surface_targets(maps: Tensor, symmetries: Tensor) -> tuple[Tensor, Tensor]:
    """The targets of `SurfaceHead`, and the cells that have a target `(batch, patches, cells)`.

    A cell has a target if it shows nothing but surface. `maps` are maps of `training_surface_maps`, which this function
    turns by `symmetries`.
    """
    cells = _cells(maps, symmetries)
    values, alpha = cells.float() / 127.5 - 1, cells[..., 6]
    vectors = [turn_points(values[..., first : first + 3].flatten(1, 2), symmetries) for first in (0, 3)]
    return torch.cat(vectors, dim=-1).view(*values.shape[:3], 6), alpha == 255


class Probe(nn.Module):
    """Predicts the field `(batch, points)` at points `(batch, points, 3)` from an image's tokens."""

    def __init__(self) -> None:
        super().__init__()
        columns = 3 + 6 * _NUM_FREQUENCIES
        self.decoder = GeometryDecoder(columns, CHANNELS, 6, False, True, 2, 1, True)
        attention = self.decoder.cross_attn_decoder.attn
        # At the start, each point attends to its place in the image.
        of_point = [3 + axis * _NUM_FREQUENCIES + octave for octave in (0, 1) for axis in (0, 1)]
        of_point += [column + 3 * _NUM_FREQUENCIES for column in of_point]
        pass_on(self.decoder.query_proj, range(columns), scale=1.5)
        for head in range(6):
            compare(attention, head, of_point, range(8))

    def forward(self, tokens: Tensor, points: Tensor) -> Tensor:
        features = fourier_features(points, _NUM_FREQUENCIES, include_pi=False)
        logits: Tensor = self.decoder(features, *self.decoder.keys_and_values(tokens))
        return logits
