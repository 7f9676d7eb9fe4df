"""The judge of meshes: the volume IoU of two shapes, and the distance of their surfaces.

A shape is a mesh, or a solid of `training.solids.solids` whose exact form is known. Both are evaluated at the same
points.
"""

from dataclasses import dataclass

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from models.mesh.surface import BOUNDS, Mesh
from training.solids.solids import Solid, SolidBatch

Shape = Mesh | Solid

NUM_CELLS = 96
"""Cells along each side of the grid of test points: 885,000 points, about a tenth of them inside a solid."""

NUM_SAMPLES = 50_000
"""Points on each surface. A solid's surface has an area of about 8, so each of its points has a sample within 0.006."""

F_SCORE_DISTANCE = 0.02
"""A hundredth of the side of the cube, as in Tatarchenko et al. 2019, https://arxiv.org/abs/1905.03678."""

_CELL = 2 * BOUNDS / NUM_CELLS

# Vertices of meshes often lie at simple fractions. The shift keeps columns of cells off their edges.
_SHIFT = 1e-3 * _CELL * np.array((0.7071, 0.5773, 0.4472))


@dataclass(frozen=True, slots=True)
class SurfaceLikeness:
    """The distance of two surfaces, in the units of coordinates.

    `chamfer` is the mean distance from one surface to the other, averaged over both directions. `f_score` is the
    harmonic mean of two shares: the share of each surface within `F_SCORE_DISTANCE` of the other.
    """

    chamfer: float
    f_score: float


def volume_iou(a: Shape, b: Shape) -> float:
    """Volume of the intersection over volume of the union; 1 if both shapes are empty."""
    inside_a, inside_b = occupancy(a), occupancy(b)
    union = int((inside_a | inside_b).sum())
    return int((inside_a & inside_b).sum()) / union if union else 1.0


def surface_likeness(a: Shape, b: Shape) -> SurfaceLikeness:
    points_a, points_b = surface_samples(a, seed=0), surface_samples(b, seed=1)
    to_b, _ = cKDTree(points_b).query(points_a)
    to_a, _ = cKDTree(points_a).query(points_b)
    precision, recall = (float((distances <= F_SCORE_DISTANCE).mean()) for distances in (to_b, to_a))
    return SurfaceLikeness(
        chamfer=float(to_b.mean() + to_a.mean()) / 2,
        f_score=2 * precision * recall / (precision + recall) if precision + recall else 0.0,
    )


def occupancy(shape: Shape) -> NDArray[np.bool_]:
    """Whether the centre of each cell is inside the shape, `(NUM_CELLS,) * 3`, x first."""
    return _inside_solid(shape) if isinstance(shape, Solid) else _inside_mesh(shape)


def surface_samples(shape: Shape, seed: int) -> NDArray[np.float64]:
    """Points on the surface, uniform by area, `(NUM_SAMPLES, 3)`."""
    if isinstance(shape, Solid):
        points, _ = SolidBatch([shape]).surface_points(NUM_SAMPLES, torch.Generator().manual_seed(seed))
        return points[0].double().numpy()
    body = trimesh.Trimesh(shape.vertices, shape.faces, process=False)
    samples, _ = trimesh.sample.sample_surface(body, NUM_SAMPLES, seed=seed)
    return np.asarray(samples, dtype=np.float64)


def _centres() -> NDArray[np.float64]:
    """The coordinates of cell centres along each axis, `(3, NUM_CELLS)`."""
    return (np.arange(NUM_CELLS) + 0.5) * _CELL - BOUNDS + _SHIFT[:, None]


def _inside_solid(solid: Solid) -> NDArray[np.bool_]:
    points = torch.cartesian_prod(*torch.from_numpy(_centres()).float())
    inside: NDArray[np.bool_] = (SolidBatch([solid]).signed_distance(points[None])[0] > 0).numpy()
    return inside.reshape((NUM_CELLS,) * 3)


def _inside_mesh(mesh: Mesh) -> NDArray[np.bool_]:
    """Whether the mesh's winding number at each cell centre is positive. The mesh must be closed; parts may overlap.

    Along a column of cells, the winding number rises by one where the column enters through a face and falls by one
    where it leaves. So it is the sum over the crossings below.
    """
    column, height, change = _crossings(mesh.vertices.astype(np.float64)[mesh.faces])
    first_above = np.ceil((height + BOUNDS - _SHIFT[2]) / _CELL - 0.5).astype(np.int64).clip(0, NUM_CELLS)
    changes = np.bincount(column * (NUM_CELLS + 1) + first_above, change, NUM_CELLS**2 * (NUM_CELLS + 1))
    winding = changes.reshape((NUM_CELLS, NUM_CELLS, NUM_CELLS + 1)).cumsum(axis=2)[:, :, :-1]
    return winding > 0.5


def _crossings(triangles: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Crossings of columns along z with `triangles` `(faces, 3, 3)`: column index, z, and 1 for entering or -1."""
    index = (triangles[:, :, :2] + BOUNDS - _SHIFT[:2]) / _CELL - 0.5
    low = np.ceil(index.min(axis=1)).astype(np.int64).clip(0, NUM_CELLS)
    high = np.floor(index.max(axis=1)).astype(np.int64).clip(-1, NUM_CELLS - 1)
    size = (high - low + 1).clip(min=0)
    count = size.prod(axis=1)
    face = np.repeat(np.arange(len(triangles)), count)
    offset = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    row = low[face, 0] + offset // size[face, 1]
    line = low[face, 1] + offset % size[face, 1]
    corners = index[face] - np.stack((row, line), axis=1)[:, None]
    # Twice the signed area of the triangle of each edge and the column. The signs show the column's side of the edge.
    after = np.roll(corners, -1, axis=1)
    areas = corners[:, :, 0] * after[:, :, 1] - corners[:, :, 1] * after[:, :, 0]
    is_crossed = (areas > 0).all(axis=1) | (areas < 0).all(axis=1)
    face, areas = face[is_crossed], areas[is_crossed]
    opposite = np.roll(triangles[face, :, 2], 1, axis=1)  # the area at an edge is the weight of the opposite corner
    height = (areas * opposite).sum(axis=1) / areas.sum(axis=1)
    # Seen from above, counter-clockwise corners are the mesh's upper side, where the column leaves it.
    change = np.where(areas[:, 0] > 0, -1.0, 1.0)
    return (row * NUM_CELLS + line)[is_crossed], height, change
