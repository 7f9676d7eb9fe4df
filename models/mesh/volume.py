"""Evaluates a field on a grid: at every point, or only near the surface.

A field is positive inside and negative outside. Away from the surface it may saturate, as a clipped signed distance
does. Grids are `(octree_resolution + 1,) * 3`; `octree_resolution` counts cells, and the first axis is x, the slowest.
Levels go from coarse to fine, as in Hunyuan3D's hierarchical volume decoding. Three things differ from it:

- Values of a coarser level are kept, since its points are points of every finer level.
- A point is refined where the field could reach the iso level within a cell, judged by its steepest change around that
  point. Hunyuan3D refines wherever the field has not saturated, which is costly where the unsaturated band is wide.
- After each level, all cells that the surface passes are completed, until no more are found. So the surface is followed
  to its end from any point where it is met.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from models.errors import EmptySurface
from models.mesh.surface import BOUNDS

MIN_COARSE_CELLS = 64
"""Least number of cells a side of the coarsest level. Its points are 1.6 % of a grid of 256."""

_REACH = 0.5
"""A point is refined if its distance from the iso level is at most this share of the change to its neighbours, summed
over the axes. The field of a plane changes by exactly this much from a point to the farthest corner of its half cells.
With twice the share, random fields lost as many points, all of them in parts that no coarse point was near."""

_PLATEAU = 0.95
"""Below this share of the median magnitude the field counts as unsaturated. Hunyuan3D's limit is 0.95 for its +-1."""

Field = Callable[[Tensor], Tensor]
"""Maps points `(points, 3)` float32 in [-bounds, bounds] to logits `(points,)`. Points do not interact."""


@torch.inference_mode()
def decode_dense(
    field: Field, octree_resolution: int, *, points_per_call: int, device: torch.device, bounds: float = BOUNDS
) -> Tensor:
    """Logits at every point of the grid, float32.

    Raises `EmptySurface` where the field is not finite, as does `decode_coarse_to_fine`.
    """
    return _evaluated(field, _axis(octree_resolution, 1, bounds, device), points_per_call)


@torch.inference_mode()
def decode_coarse_to_fine(
    field: Field,
    octree_resolution: int,
    *,
    points_per_call: int,
    device: torch.device,
    bounds: float = BOUNDS,
    iso_level: float = 0.0,
) -> Tensor:
    """The grid of `decode_dense`, evaluated only near the surface at `iso_level`; NaN elsewhere.

    Every cell with evaluated corners on both sides of the surface is complete. So are the cells at the grid's border
    where the border cuts the inside. A separate part can be missed if it is smaller than the cells of the coarsest
    level and its field saturates within half a cell, so that no coarse point shows it.
    All points are evaluated if half of the resolution is less than `MIN_COARSE_CELLS`.
    """
    stride = 1
    while _num_cells(octree_resolution, 2 * stride) >= MIN_COARSE_CELLS:
        stride *= 2
    grid_logits = _evaluated(field, _axis(octree_resolution, stride, bounds, device), points_per_call)
    plateau = _PLATEAU * (grid_logits - iso_level).abs().median()
    while stride > 1:
        stride //= 2
        is_near = _near_surface(grid_logits - iso_level, plateau)
        grid_logits = _refined(grid_logits, _num_cells(octree_resolution, stride))
        axis = _axis(octree_resolution, stride, bounds, device)
        wanted = _refined_boxes(is_near, len(axis)) & grid_logits.isnan()
        # To find the points waits for the device, once a pass. There are two or three passes a level.
        while len(index := wanted.flatten().nonzero().squeeze(1)):
            _evaluate(field, grid_logits, index.split(points_per_call), axis)
            wanted = _corners_of_crossed_cells(grid_logits, iso_level) & grid_logits.isnan()
    return grid_logits


def _num_cells(octree_resolution: int, stride: int) -> int:
    """Cells a side of a level. The last one is smaller where the stride does not divide the resolution."""
    return -(-octree_resolution // stride)


def _axis(octree_resolution: int, stride: int, bounds: float, device: torch.device) -> Tensor:
    """Coordinates of a level's points along an axis: every `stride`-th of the full grid, and the last."""
    index = (torch.arange(_num_cells(octree_resolution, stride) + 1) * stride).clamp(max=octree_resolution)
    coordinates = index.double() * (2 * bounds / octree_resolution) - bounds
    return coordinates.to(device, torch.float32)


def _unknown(num_cells: int, device: torch.device) -> Tensor:
    return torch.full((num_cells + 1,) * 3, torch.nan, device=device)


def _evaluated(field: Field, axis: Tensor, points_per_call: int) -> Tensor:
    """A level with all points evaluated."""
    grid_logits = _unknown(len(axis) - 1, axis.device)
    total = grid_logits.numel()
    starts = range(0, total, points_per_call)
    index = (torch.arange(start, min(start + points_per_call, total), device=axis.device) for start in starts)
    _evaluate(field, grid_logits, index, axis)
    return grid_logits


def _evaluate(field: Field, grid_logits: Tensor, calls: Iterable[Tensor], axis: Tensor) -> None:
    """Evaluate the points of each call, given as indices of the flattened grid."""
    flat, side = grid_logits.view(-1), len(axis)
    num_bad = torch.zeros((), dtype=torch.int64, device=axis.device)
    for index in calls:
        points = torch.stack([axis[index // side**2], axis[index // side % side], axis[index % side]], dim=1)
        logits = field(points).float()
        flat[index] = logits
        num_bad += logits.isfinite().logical_not().sum()
    if count := int(num_bad):
        raise EmptySurface(f"no surface: the field is not finite at {count} points")


def _near_surface(logits: Tensor, plateau: Tensor) -> Tensor:
    """Points within half a cell of which the surface may pass, judged by the point and its six neighbours.

    Either the field could reach 0 there. Or its magnitude has a minimum there and is unsaturated, as where a part lies
    between points and is so thin that the field saturates on both sides of it.
    """
    size = logits.abs()
    reach = torch.zeros_like(size)
    is_lowest = size < plateau
    for dim in range(3):
        # Everything beyond the border is outside.
        beyond = [2 * logits.narrow(dim, end, 1).clamp(min=0) for end in (0, logits.shape[dim] - 1)]
        change = torch.cat([beyond[0], logits.diff(dim=dim).abs(), beyond[1]], dim).nan_to_num(0)
        before, after = (change.narrow(dim, start, logits.shape[dim]) for start in (0, 1))
        reach += torch.maximum(before, after)
        rise = size.diff(dim=dim)
        is_lowest.narrow(dim, 1, rise.shape[dim]).logical_and_(rise <= 0)
        is_lowest.narrow(dim, 0, rise.shape[dim]).logical_and_(rise >= 0)
    return (size <= _REACH * reach) | is_lowest


def _refined(coarse: Tensor, num_cells: int) -> Tensor:
    """A level's values at their places in the next finer level."""
    fine = _unknown(num_cells, coarse.device)
    index = (2 * torch.arange(len(coarse), device=coarse.device)).clamp(max=num_cells)
    fine[index[:, None, None], index[:, None], index] = coarse
    return fine


def _refined_boxes(marked: Tensor, side: int) -> Tensor:
    """The points of the next finer level that are marked points or their neighbours."""
    for dim in range(3):
        between = _either(marked, dim)
        first, last = marked.split([between.shape[dim], 1], dim)
        interleaved = torch.stack([first, between], dim + 1).flatten(dim, dim + 1)
        marked = torch.cat([interleaved, last], dim).narrow(dim, 0, side)
    return marked


def _corners_of_crossed_cells(grid_logits: Tensor, iso_level: float) -> Tensor:
    """Points of the cells that have a corner known to be inside and one known to be outside."""
    is_inside = F.pad(grid_logits > iso_level, (1,) * 6, value=False)
    is_outside = F.pad(grid_logits <= iso_level, (1,) * 6, value=True)  # as everything beyond the border is
    for dim in range(3):
        is_inside, is_outside = _either(is_inside, dim), _either(is_outside, dim)
    is_corner = is_inside & is_outside
    for dim in range(3):
        is_corner = _either(is_corner, dim)
    return is_corner


def _either(mask: Tensor, dim: int) -> Tensor:
    """Joins neighbours by "or": from points to the cells between them, or from cells to the points between them."""
    num_pairs = mask.shape[dim] - 1
    return mask.narrow(dim, 0, num_pairs) | mask.narrow(dim, 1, num_pairs)
