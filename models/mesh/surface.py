"""Extracts a field's surface from its values on a grid. No torch: it can run beside the device thread."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.measure import marching_cubes

from models.errors import EmptySurface

BOUNDS = 1.01
"""Half the side of the cube, centred on the origin, that grids fill. Hunyuan3D's shape VAE was trained in this cube."""


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """Triangles, counter-clockwise seen from outside.

    `vertices` `(vertices, 3)` float32 are x, y, z with y up, as in glTF and in the models' training. `faces`
    `(faces, 3)` int32 are rows of `vertices`.
    """

    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class FieldSamples:
    """The evaluated points of a grid with `num_points` a side: little to send to another process.

    `index` `(samples,)` int32 are places in the flattened grid, `logits` `(samples,)` float32 the field's values there.
    """

    num_points: int
    index: NDArray[np.int32]
    logits: NDArray[np.float32]

    def grid_logits(self) -> NDArray[np.float32]:
        """The grid `(num_points,) * 3`; NaN marks points that were not evaluated."""
        grid = np.full(self.num_points**3, np.nan, np.float32)
        grid[self.index] = self.logits
        return grid.reshape((self.num_points,) * 3)


def extract_surface(grid_logits: NDArray[np.float32], *, iso_level: float = 0.0, bounds: float = BOUNDS) -> Mesh:
    """The surface where the field is `iso_level`, by marching cubes (Lewiner et al. 2003, scikit-image).

    The field is larger inside. `grid_logits` is `(points,) * 3`, x first, from -`bounds` to `bounds`, both included:
    with R cells a side, point i is at `i / R * 2 * bounds - bounds`. (Hunyuan3D's own code divides by R + 1, which
    shrinks and shifts its meshes.) NaN marks points that were not evaluated; cells with such a corner are left out. A
    solid that reaches beyond the grid is closed by a flat face at the grid's border.
    Raises `EmptySurface` if all points lie on one side.
    """
    lowest, highest = float(np.nanmin(grid_logits)), float(np.nanmax(grid_logits))
    if not lowest <= iso_level < highest:
        raise EmptySurface(
            f"no surface: the field lies in [{lowest:.4g}, {highest:.4g}] and never crosses {iso_level:g}"
        )
    num_cells = len(grid_logits) - 1
    is_cut = any((end > iso_level).any() for dim in range(3) for end in np.take(grid_logits, [0, -1], axis=dim))
    if is_cut:
        # So low a value that the vertices of the closing face lie on the border up to rounding.
        grid_logits = np.pad(grid_logits, 1, constant_values=iso_level - 1e6 * (highest - iso_level))
    is_known = ~np.isnan(grid_logits)
    positions, faces, _, _ = marching_cubes(
        grid_logits,
        iso_level,
        # scikit-image's "descent" orients faces for axes in the order z, y, x.
        gradient_direction="ascent",
        mask=None if is_known.all() else _last_corners_of_complete_cells(is_known),
    )
    vertices = (positions.astype(np.float64) - int(is_cut)) * (2 * bounds / num_cells) - bounds
    return Mesh(
        vertices=vertices.clip(-bounds, bounds).astype(np.float32), faces=np.ascontiguousarray(faces, dtype=np.int32)
    )


def _last_corners_of_complete_cells(is_known: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """scikit-image's mask: it is read at the corner of each cell with the largest indices."""
    complete = is_known[1:] & is_known[:-1]
    complete = complete[:, 1:] & complete[:, :-1]
    mask = np.zeros_like(is_known)
    np.logical_and(complete[:, :, 1:], complete[:, :, :-1], out=mask[1:, 1:, 1:])
    return mask
