"""Draws random solids: one primitive, a union of two or a cut, from an integer seed.

Solids are drawn as the camera sees them, so that a solid and its image share one frame.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from training.solids.primitives import Array, half_sides
from training.solids.solids import COMBINATIONS, HELD_OUT, KINDS, Operation, Part, Solid, SolidBatch, Vector

LONGEST_HALF_SIDE = 0.9

# The second part: its size as a share of a first part's size, the least z of its direction from the first part, and the
# distance of its centre from the first part's surface, in its own half sides.
_SHARE: dict[Operation, tuple[float, float]] = {"union": (0.6, 0.95), "cut": (0.5, 0.8)}
_LEAST_Z: dict[Operation, float] = {"union": -0.4, "cut": 0.35}
_OUTWARD: dict[Operation, tuple[float, float]] = {"union": (-0.4, 0.5), "cut": (-0.5, 0.3)}

_QUARTER_TURNS = [
    turn
    for order in itertools.permutations(range(3))
    for signs in itertools.product((-1.0, 1.0), repeat=3)
    if np.linalg.det(turn := np.eye(3)[list(order)] * signs) > 0
]
_GRID_CELLS = 15


def sample_solids(seeds: Sequence[int], *, held_out: bool = False) -> list[Solid]:
    """Draw solids: one primitive (40 %), a union (35 %) or a cut (25 %), in random rotations.

    A solid's bounding box is centred at 0, and the longest of its half sides is `LONGEST_HALF_SIDE`. `held_out=True`
    draws only held-out combinations, so no single primitives; `False` draws only the others. Each solid depends on its
    own seed alone; drawing many in one call is faster.
    """
    rngs = [random.Random(f"solid-{seed}-{held_out}") for seed in seeds]
    combinations = [_sample_combination(rng, held_out) for rng in rngs]
    solids = [_propose(rng, *combination) for rng, combination in zip(rngs, combinations, strict=True)]
    doubtful = [i for i, solid in enumerate(solids) if solid.operation is not None]
    while doubtful:
        is_clear = _shows_both_parts(SolidBatch([solids[i] for i in doubtful])).tolist()
        doubtful = [i for i, clear in zip(doubtful, is_clear, strict=True) if not clear]
        for i in doubtful:
            solids[i] = _propose(rngs[i], *combinations[i])
    return _centred(solids)


def training_solids(start: int, count: int) -> list[Solid]:
    """Solids `start` to `start + count - 1` of the endless training stream."""
    return sample_solids(range(start, start + count))


def _sample_combination(rng: random.Random, held_out: bool) -> tuple[Operation | None, tuple[str, ...]]:
    operations: tuple[Operation | None, ...] = (None, "union", "cut")
    operation = rng.choices(operations, weights=(0 if held_out else 40, 35, 25))[0]
    if operation is None:
        return None, (rng.choice(KINDS),)
    return operation, rng.choice(
        [pair for pair in COMBINATIONS[operation] if (pair in HELD_OUT[operation]) == held_out]
    )


def _propose(rng: random.Random, operation: Operation | None, kinds: tuple[str, ...]) -> Solid:
    """Draw a solid near 0. A second part is at right angles to the first, on a side that the camera sees."""
    axes = _sample_rotation(rng)
    while not _is_recognisable(kinds[0], axes):
        axes = _sample_rotation(rng)
    size = _sample_size(rng, kinds[0])
    first = _part(kinds[0], size, axes, np.zeros(3))
    if operation is None:
        return Solid((first,), None)
    second_size = rng.uniform(*_SHARE[operation]) * _sample_size(rng, kinds[1])
    turn = rng.choice(_QUARTER_TURNS)
    reach, second_reach = half_sides(kinds[0], size), abs(turn) @ half_sides(kinds[1], second_size)
    offset = reach * [rng.uniform(-0.35, 0.35) for _ in range(3)]
    sides = [(axis, sign) for axis in range(3) for sign in (-1, 1) if sign * axes[2, axis] > _LEAST_Z[operation]]
    axis, sign = rng.choice(sides)
    offset[axis] = sign * (reach[axis] + rng.uniform(*_OUTWARD[operation]) * second_reach[axis])
    return Solid((first, _part(kinds[1], second_size, axes @ turn, axes @ offset)), operation)


def _sample_rotation(rng: random.Random) -> Array:
    """A uniformly distributed rotation matrix."""
    quaternion = np.array([rng.gauss(0, 1) for _ in range(4)])
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _is_recognisable(kind: str, axes: Array) -> bool:
    """Whether the camera can recognise a primitive: no box face on, no tube end on, no cone from below."""
    x, y, z = axes[2]  # the component of each axis towards the camera
    match kind:
        case "sphere":
            return True
        case "torus":
            return bool(abs(y) > 0.3)
        case "box":
            return bool(max(abs(x), abs(y), abs(z)) < 0.9)
        case "cone":
            return bool(-0.5 < y < 0.9)
        case _:
            return bool(abs(y) < 0.9)


def _sample_size(rng: random.Random, kind: str) -> Array:
    """The size of a primitive. Its longest half side is about 0.4 to 1, and no part of it is very thin."""
    long, middle, short = (rng.uniform(low, 1) for low in (0.8, 0.5, 0.4))
    if kind == "sphere":
        return np.array((long, 0, 0))
    if kind == "torus":
        tube = rng.uniform(0.35, 0.5)
        return np.array((1, tube, 0)) * long / (1 + tube)
    if kind == "capsule":
        radius = rng.uniform(0.4, 0.6)
        return np.array((radius, 1 - radius, 0)) * long
    sides = np.array(rng.sample((long, middle, short), 3))
    return sides if kind == "box" else sides * (1, 1, 0)


def _part(kind: str, size: Array, rotation: Array, centre: Array) -> Part:
    x, y, z = (_vector(row) for row in rotation)
    return Part(kind, _vector(size), (x, y, z), _vector(centre))


def _vector(values: Array) -> Vector:
    x, y, z = values.tolist()
    return x, y, z


def _shows_both_parts(batch: SolidBatch) -> Tensor:
    """Whether the overlap is neither too small nor too large and the camera sees both parts or the cut, `(batch,)`."""
    lower, upper = batch.bounds()
    cells = (torch.arange(_GRID_CELLS) + 0.5) / _GRID_CELLS
    grid = torch.cartesian_prod(cells, cells, cells.flip(0))  # columns along z; each starts at the camera's side
    distances = batch.part_distances(torch.lerp(lower[:, None], upper[:, None], grid))
    first, second = (distances > 0).unflatten(-1, (-1, _GRID_CELLS))
    whole = (batch.combine(distances) > 0).unflatten(-1, (-1, _GRID_CELLS))

    def share(subset: Tensor, of: Tensor) -> Tensor:
        return subset.flatten(1).sum(1) / of.flatten(1).sum(1).clamp(min=1)

    depth_first, depth_second, depth_whole = (_depth(filled) for filled in (first, second, whole))
    is_first, is_second = depth_first < _GRID_CELLS, depth_second < _GRID_CELLS
    overlap = torch.maximum(share(first & second, first), share(first & second, second))
    seen_first = share(is_first & (depth_first <= depth_second), is_first)
    seen_second = share(is_second & (depth_second <= depth_first), is_second)
    removed = 1 - share(whole, first)
    changed = share(depth_whole != depth_first, is_first)
    good_union = (overlap > 0.1) & (overlap < 0.6) & (seen_first > 0.4) & (seen_second > 0.4)
    good_cut = (removed > 0.08) & (removed < 0.45) & (changed > 0.12) & (changed < 0.6)
    return torch.where(batch.is_cut, good_cut, good_union)


def _depth(filled: Tensor) -> Tensor:
    """The number of empty cells before the first filled cell of each column, from `(batch, columns, cells)`."""
    return torch.where(filled.any(-1), filled.int().argmax(-1), filled.shape[-1])


def _tight_bounds(solids: Sequence[Solid]) -> tuple[Tensor, Tensor]:
    """Opposite corners of the solids' bounding boxes, `(batch, 3)` each."""
    lower, upper = SolidBatch(solids).bounds()
    cuts = [i for i, solid in enumerate(solids) if solid.operation == "cut"]
    if cuts:
        lower[cuts], upper[cuts] = _bounds_of_cuts(SolidBatch([solids[i] for i in cuts]))
    return lower, upper


def _bounds_of_cuts(batch: SolidBatch) -> tuple[Tensor, Tensor]:
    """Opposite corners of the bounding boxes of cuts, `(batch, 3)` each, to about a thousandth.

    If the outermost point of the first part is cut away, no formula gives the next one. A random search finds it: it
    starts at the outermost of many surface points, and its steps become smaller.
    """
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(4, 1, 1024, generator=generator).expand(-1, 2 * batch.num_solids, -1)
    steps = torch.randn(48, 3, generator=generator)
    outward = torch.cat((torch.eye(3), -torch.eye(3)))
    of_first, of_second = batch.part_surfaces(draw)[0]
    points = torch.cat((batch.support_points()[0], of_first, of_second), 1)[:, None]
    for i in range(16):
        is_inside = batch.signed_distance(points.flatten(1, 2)).unflatten(1, (-1, points.shape[2])) > -1e-5
        height = (points @ outward[:, :, None])[..., 0].where(is_inside, -torch.inf)
        best = points.take_along_dim(height.argmax(2)[..., None, None], 2)
        points = torch.cat((best, best + 0.15 * 0.7**i * steps), 2)
    highest, lowest = best[:, :, 0].unflatten(1, (2, 3)).diagonal(dim1=2, dim2=3).unbind(1)
    return lowest, highest


def _centred(solids: Sequence[Solid]) -> list[Solid]:
    """Centre the solids at 0 and scale them to `LONGEST_HALF_SIDE`."""
    lower, upper = _tight_bounds(solids)
    scale = LONGEST_HALF_SIDE / ((upper - lower) / 2).amax(1)
    return [
        replace(
            solid,
            parts=tuple(
                _part(
                    part.kind,
                    np.array(part.size) * factor,
                    np.array(part.rotation),
                    (np.array(part.centre) - middle) * factor,
                )
                for part in solid.parts
            ),
        )
        for solid, middle, factor in zip(solids, ((lower + upper) / 2).numpy(), scale.numpy(), strict=True)
    ]
