"""Solids for image-to-shape: one primitive, a union of two or a cut, drawn from an integer seed.

Coordinates are those of Hunyuan3D's shapes: y up, seen from +z, inside the cube from -1 to 1. Every solid is drawn as
the camera sees it, so that its picture and its shape share one frame. Distances are positive inside.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from training.solids.primitives import PRIMITIVES

KINDS = tuple(PRIMITIVES)
LONGEST_HALF_SIDE = 0.9

Operation = Literal["union", "cut"]
Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]
Array = npt.NDArray[np.float64]

# A union is the same either way round, so it is listed once. A torus cuts nothing: its groove is finer than the rest.
COMBINATIONS: dict[Operation, tuple[tuple[str, str], ...]] = {
    "union": tuple(itertools.combinations_with_replacement(KINDS, 2)),
    "cut": tuple((base, tool) for base in KINDS for tool in KINDS if tool != "torus"),
}
HELD_OUT: dict[Operation, frozenset[tuple[str, str]]] = {
    "union": frozenset({("sphere", "box"), ("cylinder", "cone"), ("torus", "capsule")}),
    "cut": frozenset(
        {
            ("box", "cone"),
            ("sphere", "cylinder"),
            ("cylinder", "box"),
            ("cone", "sphere"),
            ("torus", "capsule"),
        }
    ),
}


@dataclass(frozen=True, slots=True)
class Part:
    """A primitive in its place. A point of it is `rotation @ local + centre`; for `size` see `primitives`."""

    kind: str
    size: Vector
    rotation: Matrix
    centre: Vector


@dataclass(frozen=True, slots=True)
class Solid:
    """One part, or two joined by `operation`: their union, or the first with the second cut away."""

    parts: tuple[Part, ...]
    operation: Operation | None

    @property
    def is_held_out(self) -> bool:
        """Whether this combination of kinds is one of those that never occur in training."""
        kinds = tuple(part.kind for part in self.parts)
        return self.operation is not None and kinds in HELD_OUT[self.operation]


class SolidBatch:
    """The tensors of many solids, to evaluate them together: each kind of primitive only for the parts of that kind."""

    def __init__(self, solids: Sequence[Solid]) -> None:
        of_row = {
            slot * len(solids) + i: part for i, solid in enumerate(solids) for slot, part in enumerate(solid.parts)
        }
        self.num_solids = len(solids)
        self.is_cut = torch.tensor([solid.operation == "cut" for solid in solids])
        self._groups = [
            _Group(kind, {row: part for row, part in of_row.items() if part.kind == kind}, len(solids))
            for kind in KINDS
            if any(part.kind == kind for part in of_row.values())
        ]

    def signed_distance(self, points: Tensor) -> Tensor:
        """Distances from points `(batch, points, 3)` to the surfaces, positive inside. Returns `(batch, points)`.

        Exact for one primitive. For two the sign is right and the distance at most the true one.
        """
        return self.combine(self.part_distances(points))

    def part_distances(self, points: Tensor) -> Tensor:
        """The same for each part alone. Returns `(2, batch, points)`, -inf where a solid has no second part."""
        distances = points.new_full((2 * self.num_solids, points.shape[1]), -torch.inf)
        coordinates = points.transpose(1, 2)
        for group in self._groups:
            local = group.rotation.mT @ (coordinates[group.solid] - group.centre.mT)
            distances[group.row] = group.primitive.signed_distance(*local.unbind(1), *group.size)
        return distances.unflatten(0, (2, self.num_solids))

    def combine(self, part_distances: Tensor) -> Tensor:
        """Distances to the solids from those to their parts."""
        first, second = part_distances
        return torch.where(self.is_cut[:, None], torch.minimum(first, -second), torch.maximum(first, second))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Opposite corners of boxes that hold the solids, `(batch, 3)` each: tight, but for cuts those of the whole."""
        support = self.support_points()
        support[1, self.is_cut] = torch.nan
        highest, lowest = support[:, :, :3].diagonal(dim1=2, dim2=3), support[:, :, 3:].diagonal(dim1=2, dim2=3)
        return torch.fmin(*lowest), torch.fmax(*highest)

    def support_points(self) -> Tensor:
        """The outermost points of each part towards +x, +y, +z, -x, -y, -z. `(2, batch, 6, 3)`, nan for no part."""
        directions = torch.cat((torch.eye(3), -torch.eye(3)))
        support = torch.full((2 * self.num_solids, 6, 3), torch.nan)
        for group in self._groups:
            local = group.primitive.support(directions @ group.rotation, *group.size)
            support[group.row] = local @ group.rotation.mT + group.centre
        return support.unflatten(0, (2, self.num_solids))

    def surface_points(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points that are uniform by area on each surface, and their outward normals, `(batch, count, 3)` each.

        Points are drawn on the parts' own surfaces, and more of them as long as the other parts leave too few.
        """
        drawn = [self._draw(2 * count, generator)]
        while int(torch.cat([kept for _, _, kept in drawn], 1).sum(1).min()) < count:
            drawn.append(self._draw(2 * count, generator))
        points, normals, is_kept = (torch.cat(tensors, 1) for tensors in zip(*drawn, strict=True))
        first_kept = torch.argsort(~is_kept, dim=1, stable=True)[:, :count, None].expand(-1, -1, 3)
        return points.gather(1, first_kept), normals.gather(1, first_kept)

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Points that are uniform on the parts' surfaces, outward normals, and which are on the solids' surfaces."""
        points, normals = self.part_surfaces(torch.rand(4, 2 * self.num_solids, count, generator=generator))
        area = torch.zeros(2 * self.num_solids, 1)
        for group in self._groups:
            area[group.row] = group.primitive.area(*group.size)
        area = area.unflatten(0, (2, self.num_solids))
        is_second = torch.rand(self.num_solids, count, generator=generator) * area.sum(0) > area[0]
        points, normals = (torch.where(is_second[..., None], t[1], t[0]) for t in (points, normals))
        first, second = self.part_distances(points)
        is_inward = is_second & self.is_cut[:, None]
        is_kept = torch.where(is_second, (first > 0) == is_inward, second < 0)
        return points, torch.where(is_inward[..., None], -normals, normals), is_kept

    def part_surfaces(self, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Uniform points on the parts' own surfaces from uniform numbers `(4, 2 * batch, points)`, and their normals.

        Both are `(2, batch, points, 3)`, and 0 where a solid has no second part.
        """
        points, normals = torch.zeros(2, *draw.shape[1:], 3)
        for group in self._groups:
            on_surface, outward = group.primitive.surface(draw[:, group.row], *group.size)
            points[group.row] = on_surface @ group.rotation.mT + group.centre
            normals[group.row] = outward @ group.rotation.mT
        return points.unflatten(0, (2, self.num_solids)), normals.unflatten(0, (2, self.num_solids))


class _Group:
    """The parts of one kind. `row` counts all first parts, then all second parts."""

    def __init__(self, kind: str, parts: dict[int, Part], num_solids: int) -> None:
        self.primitive = PRIMITIVES[kind]
        self.row = torch.tensor(list(parts))
        self.solid = self.row % num_solids
        self.size = torch.tensor([part.size for part in parts.values()]).T[..., None].unbind()
        self.rotation = torch.tensor([part.rotation for part in parts.values()])
        self.centre = torch.tensor([[part.centre] for part in parts.values()])


def sample_solid(seed: int, *, held_out: bool = False) -> Solid:
    """Draw solid `seed`: one primitive (40 %), a union (35 %) or a cut (25 %), turned at random.

    Its bounding box is centred at 0, and `LONGEST_HALF_SIDE` is the longest of its half sides.
    `held_out=True` draws combinations that training never shows, so no single primitives, `False` only the others.
    """
    return sample_solids([seed], held_out=held_out)[0]


def sample_solids(seeds: Sequence[int], *, held_out: bool = False) -> list[Solid]:
    """Draw many solids, faster than one by one. A solid does not depend on those drawn with it."""
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


# How the second part lies: its size as a share of a first part's, the least z of the direction that it lies in, and how
# far its centre is outside of the first part, in its own half sides.
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


def _sample_combination(rng: random.Random, held_out: bool) -> tuple[Operation | None, tuple[str, ...]]:
    operations: tuple[Operation | None, ...] = (None, "union", "cut")
    operation = rng.choices(operations, weights=(0 if held_out else 40, 35, 25))[0]
    if operation is None:
        return None, (rng.choice(KINDS),)
    return operation, rng.choice(
        [pair for pair in COMBINATIONS[operation] if (pair in HELD_OUT[operation]) == held_out]
    )


def _propose(rng: random.Random, operation: Operation | None, kinds: tuple[str, ...]) -> Solid:
    """Draw a solid near 0. A second part stands at right angles to the first, on a side that the camera can see."""
    axes = _sample_rotation(rng)
    while not _tells_its_kind(kinds[0], axes):
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
    """A rotation matrix, every rotation being as likely."""
    quaternion = np.array([rng.gauss(0, 1) for _ in range(4)])
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _tells_its_kind(kind: str, axes: Array) -> bool:
    """Whether a primitive, turned so, looks like itself: no box face on, no tube end on, no cone from below."""
    x, y, z = axes[2]  # how far each axis points towards the camera
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
    """The size of a primitive whose longest half side is some 0.4 to 1, none of it being very thin."""
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


def half_sides(kind: str, size: Array) -> Array:
    """The half sides of the box of a primitive that is not turned."""
    a, b, _ = size
    match kind:
        case "box":
            return size
        case "sphere":
            return np.array((a, a, a))
        case "torus":
            return np.array((a + b, b, a + b))
        case "capsule":
            return np.array((a, a + b, a))
        case _:
            return np.array((a, b, a))


def _part(kind: str, size: Array, rotation: Array, centre: Array) -> Part:
    x, y, z = (_vector(row) for row in rotation)
    return Part(kind, _vector(size), (x, y, z), _vector(centre))


def _vector(values: Array) -> Vector:
    x, y, z = values.tolist()
    return x, y, z


def _shows_both_parts(batch: SolidBatch) -> Tensor:
    """Whether parts overlap enough but not too much, and the camera sees enough of both, or of the cut: `(batch,)`."""
    lower, upper = batch.bounds()
    cells = (torch.arange(_GRID_CELLS) + 0.5) / _GRID_CELLS
    grid = torch.cartesian_prod(cells, cells, cells.flip(0))  # columns, each from the camera away
    distances = batch.part_distances(torch.lerp(lower[:, None], upper[:, None], grid))
    first, second = (distances > 0).unflatten(-1, (-1, _GRID_CELLS))
    whole = (batch.combine(distances) > 0).unflatten(-1, (-1, _GRID_CELLS))

    def share(part: Tensor, of: Tensor) -> Tensor:
        return part.flatten(1).sum(1) / of.flatten(1).sum(1).clamp(min=1)

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
    """How many empty cells come before the first filled one of each column, `(batch, columns, cells)`."""
    return torch.where(filled.any(-1), filled.int().argmax(-1), filled.shape[-1])


def _tight_bounds(solids: Sequence[Solid]) -> tuple[Tensor, Tensor]:
    """Opposite corners of the solids' bounding boxes, `(batch, 3)` each."""
    lower, upper = SolidBatch(solids).bounds()
    cuts = [i for i, solid in enumerate(solids) if solid.operation == "cut"]
    if cuts:
        lower[cuts], upper[cuts] = _bounds_of_cuts(SolidBatch([solids[i] for i in cuts]))
    return lower, upper


def _bounds_of_cuts(batch: SolidBatch) -> tuple[Tensor, Tensor]:
    """Opposite corners of the boxes of cuts, `(batch, 3)` each, to about a thousandth.

    An outermost point of the first part that is cut away leaves no formula for the next one. It is searched for, from
    the outermost of many points of the surface, by random steps that become smaller.
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
    """The solids moved to 0 and scaled to their size."""
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
