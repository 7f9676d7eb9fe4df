"""Evaluates a field on a grid: at every point, or only near the surface.

A field is positive inside and negative outside. Away from the surface it may saturate, as a clipped signed distance
does. Grids are `(octree_resolution + 1,) * 3`; `octree_resolution` counts cells, and the first axis is x, the slowest.
Levels go from coarse to fine, as in Hunyuan3D's hierarchical volume decoding. Three things differ from it:

- Values of a coarser level are kept, since its points are points of every finer level.
- A point is refined where the field could reach the iso level within a cell, judged by its steepest change around that
  point. Hunyuan3D refines wherever the field has not saturated, which is costly where the unsaturated band is wide.
- After each level, all cells that the surface passes are completed, until no more are found. So the surface is followed
  to its end from any point where it is met.

Grids are searched slab by slab. That bounds the memory beside the grid, and the time of each turn of a decoding.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.errors import EmptySurface
from models.mesh.size import coarsest_stride, num_cells
from models.mesh.surface import BOUNDS, FieldSamples

_REACH = 0.5
"""A point is refined if its distance from the iso level is at most this share of the change to its neighbours, summed
over the axes. The field of a plane changes by exactly this much from a point to the farthest corner of its half cells.
With twice the share, random fields lost as many points, all of them in parts that no coarse point was near."""

_PLATEAU = 0.95
"""Below this share of the median magnitude the field counts as unsaturated. Hunyuan3D's limit is 0.95 for its +-1."""

T = TypeVar("T")

Field = Callable[[Tensor], Tensor]
"""Maps points `(points, 3)` float32 in [-bounds, bounds] to logits `(points,)`. Points do not interact."""


Decoding = Generator[None, None, Tensor]
"""Decodes a grid in turns: each `next` takes a small part of the whole time, and the end returns the grid."""

_SLAB_POINTS = 2**22
"""Points of a slab. A grid of 512 cells a side has slabs of 14 planes; each is read with a plane of both neighbours."""


@torch.inference_mode()
def decode_dense(
    field: Field, octree_resolution: int, *, points_per_call: int, device: torch.device, bounds: float = BOUNDS
) -> Tensor:
    """Logits at every point of the grid, float32.

    Raises `EmptySurface` where the field is not finite, as does `decode_in_turns`.
    """
    return finished(_evaluated(field, _axis(octree_resolution, 1, bounds, device), points_per_call))


def finished(decoding: Generator[None, None, T]) -> T:
    """The result of `decoding`, after all its turns."""
    while True:
        try:
            next(decoding)
        except StopIteration as end:
            result: T = end.value
            return result


@torch.inference_mode()
def decode_in_turns(
    field: Field,
    octree_resolution: int,
    *,
    points_per_call: int,
    device: torch.device,
    bounds: float = BOUNDS,
    iso_level: float = 0.0,
) -> Decoding:
    """The grid of `decode_dense`, evaluated only near the surface at `iso_level`; NaN elsewhere.

    Every cell with evaluated corners on both sides of the surface is complete. So are the cells at the grid's border
    where the border cuts the inside. A separate part can be missed if it is smaller than the cells of the coarsest
    level and its field saturates within half a cell, so that no coarse point shows it.
    All points are evaluated if half of the resolution is less than `MIN_COARSE_CELLS` of `models.mesh.size`.
    """
    stride = coarsest_stride(octree_resolution)
    grid_logits = yield from _evaluated(field, _axis(octree_resolution, stride, bounds, device), points_per_call)
    plateau = _PLATEAU * (grid_logits - iso_level).abs().median()
    while stride > 1:
        stride //= 2
        axis = _axis(octree_resolution, stride, bounds, device)
        is_near = yield from _near_surface(grid_logits, iso_level, plateau)
        grid_logits, index = yield from _refined(grid_logits, is_near, len(axis))
        # To find the points waits for the device, once a slab. There are two or three passes a level.
        while len(index):
            yield from _evaluate(field, grid_logits, index.split(points_per_call), axis)
            index = yield from _missing_corners(grid_logits, iso_level)
    return grid_logits


def sample_in_turns(grid_logits: Tensor) -> Generator[None, None, FieldSamples]:
    """The evaluated points of a grid, in turns as short as those of its decoding."""
    index, logits = [], []
    for start, end in _slabs(len(grid_logits)):
        known = _points(grid_logits[start:end].isfinite(), start)
        index.append(known.int().cpu().numpy())
        logits.append(grid_logits.view(-1)[known].cpu().numpy())
        yield
    return FieldSamples(len(grid_logits), np.concatenate(index), np.concatenate(logits))


def _axis(octree_resolution: int, stride: int, bounds: float, device: torch.device) -> Tensor:
    """Coordinates of a level's points along an axis: every `stride`-th of the full grid, and the last."""
    index = (torch.arange(num_cells(octree_resolution, stride) + 1) * stride).clamp(max=octree_resolution)
    coordinates = index.double() * (2 * bounds / octree_resolution) - bounds
    return coordinates.to(device, torch.float32)


def _slabs(side: int) -> Iterator[tuple[int, int]]:
    """The first plane of each slab of a grid, an even number, and the plane after its last."""
    num_planes = max(2, _SLAB_POINTS // side**2 // 2 * 2)
    return ((start, min(start + num_planes, side)) for start in range(0, side, num_planes))


def _evaluated(field: Field, axis: Tensor, points_per_call: int) -> Decoding:
    """A level with all points evaluated."""
    grid_logits = torch.full((len(axis),) * 3, torch.nan, device=axis.device)
    total = grid_logits.numel()
    starts = range(0, total, points_per_call)
    index = (torch.arange(start, min(start + points_per_call, total), device=axis.device) for start in starts)
    yield from _evaluate(field, grid_logits, index, axis)
    return grid_logits


def _evaluate(field: Field, grid_logits: Tensor, calls: Iterable[Tensor], axis: Tensor) -> Generator[None, None, None]:
    """Evaluate the points of each call, given as indices of the flattened grid."""
    flat, side, num_bad = grid_logits.view(-1), len(axis), 0
    for index in calls:
        points = torch.stack([axis[index // side**2], axis[index // side % side], axis[index % side]], dim=1)
        logits = field(points).float()
        flat[index] = logits
        num_bad += int(logits.isfinite().logical_not().sum())  # waits for the device, so that a turn takes its time
        yield
    if num_bad:
        raise EmptySurface(f"no surface: the field is not finite at {num_bad} points")


def _near_surface(grid_logits: Tensor, iso_level: float, plateau: Tensor) -> Decoding:
    """Points within half a cell of which the surface may pass."""
    is_near = torch.empty(grid_logits.shape, dtype=torch.bool, device=grid_logits.device)
    for start, end in _slabs(len(grid_logits)):
        first = max(start - 1, 0)
        is_near[start:end] = _may_pass(grid_logits[first : end + 1] - iso_level, plateau)[start - first :][
            : end - start
        ]
        yield
    return is_near


def _may_pass(logits: Tensor, plateau: Tensor) -> Tensor:
    """Whether the surface may pass within half a cell, judged by the point and its six neighbours.

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


def _refined(coarse: Tensor, is_near: Tensor, side: int) -> Generator[None, None, tuple[Tensor, Tensor]]:
    """The next finer level with the values of `coarse` at their places, and the points of it to evaluate."""
    fine = torch.empty((side,) * 3, device=coarse.device)
    place = (2 * torch.arange(len(coarse), device=coarse.device)).clamp(max=side - 1)
    found = []
    for start, end in _slabs(side):
        known = slice(start // 2, len(coarse) if end == side else end // 2)
        fine[start:end] = torch.nan
        fine[place[known, None, None], place[:, None], place] = coarse[known]
        boxes = _refined_boxes(is_near[start // 2 : end // 2 + 1], (end - start, side, side))
        found.append(_points(boxes & fine[start:end].isnan(), start))
        yield
    return fine, torch.cat(found)


def _refined_boxes(marked: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The points of the next finer level that are marked points or their neighbours; `shape` is the finer shape."""
    for dim, length in enumerate(shape):
        between = _either(marked, dim)
        first, last = marked.split([between.shape[dim], 1], dim)
        interleaved = torch.stack([first, between], dim + 1).flatten(dim, dim + 1)
        marked = torch.cat([interleaved, last], dim).narrow(dim, 0, length)
    return marked


def _missing_corners(grid_logits: Tensor, iso_level: float) -> Decoding:
    """The points not yet evaluated of the cells that the surface passes."""
    found = []
    for start, end in _slabs(len(grid_logits)):
        first = max(start - 1, 0)
        corners = _corners_of_crossed_cells(grid_logits[first : end + 1], iso_level)[start - first :][: end - start]
        found.append(_points(corners & grid_logits[start:end].isnan(), start))
        yield
    return torch.cat(found)


def _points(wanted: Tensor, first_plane: int) -> Tensor:
    """The marked points of a slab, as indices of the flattened grid."""
    return wanted.flatten().nonzero().squeeze(1) + first_plane * wanted[0].numel()


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
