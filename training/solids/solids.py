"""Solids: one primitive, the union of two, or one cut out of another.

Coordinates are those of Hunyuan3D's shapes: y points up, the camera is on the +z axis, and solids lie inside the cube
from -1 to 1. Distances are positive inside.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from training.solids.primitives import PRIMITIVES

KINDS = tuple(PRIMITIVES)

Operation = Literal["union", "cut"]
Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]

# The order of a union's parts does not matter, so it is listed once. A torus cuts nothing: its groove is too fine.
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
    """A placed primitive. Its points are `rotation @ local + centre`; for `size` see `training.solids.primitives`."""

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
        """Whether this combination of kinds never occurs in training."""
        kinds = tuple(part.kind for part in self.parts)
        return self.operation is not None and kinds in HELD_OUT[self.operation]


class SolidBatch:
    """Many solids as tensors, evaluated together. Each kind of primitive is computed only for its own parts."""

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

        They are exact for one primitive. For two, the sign is exact and the distance is at most the true one.
        """
        return self.combine(self.part_distances(points))

    def part_distances(self, points: Tensor) -> Tensor:
        """Distances to each part alone. Returns `(2, batch, points)`, -inf where a solid has no second part."""
        distances = points.new_full((2 * self.num_solids, points.shape[1]), -torch.inf)
        coordinates = points.transpose(1, 2)
        for group in self._groups:
            local = group.rotation.mT @ (coordinates[group.solid] - group.centre.mT)
            distances[group.row] = group.primitive.signed_distance(*local.unbind(1), *group.size)
        return distances.unflatten(0, (2, self.num_solids))

    def combine(self, part_distances: Tensor) -> Tensor:
        """Distances to the solids, computed from the distances to their parts."""
        first, second = part_distances
        return torch.where(self.is_cut[:, None], torch.minimum(first, -second), torch.maximum(first, second))

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Opposite corners of the solids' boxes, `(batch, 3)` each. A cut has the box of its uncut first part."""
        support = self.support_points()
        support[1, self.is_cut] = torch.nan
        highest, lowest = support[:, :, :3].diagonal(dim1=2, dim2=3), support[:, :, 3:].diagonal(dim1=2, dim2=3)
        return torch.fmin(*lowest), torch.fmax(*highest)

    def support_points(self) -> Tensor:
        """Each part's outermost points along +x, +y, +z, -x, -y, -z, `(2, batch, 6, 3)`; nan without a part."""
        directions = torch.cat((torch.eye(3), -torch.eye(3)))
        support = torch.full((2 * self.num_solids, 6, 3), torch.nan)
        for group in self._groups:
            local = group.primitive.support(directions @ group.rotation, *group.size)
            support[group.row] = local @ group.rotation.mT + group.centre
        return support.unflatten(0, (2, self.num_solids))

    def surface_points(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points uniform by area on each surface, and their outward normals, `(batch, count, 3)` each.

        Points are drawn on the surfaces of the parts; points inside another part are dropped, and more are drawn.
        """
        drawn = [self._draw(2 * count, generator)]
        while int(torch.cat([kept for _, _, kept in drawn], 1).sum(1).min()) < count:
            drawn.append(self._draw(2 * count, generator))
        points, normals, is_kept = (torch.cat(tensors, 1) for tensors in zip(*drawn, strict=True))
        first_kept = torch.argsort(~is_kept, dim=1, stable=True)[:, :count, None].expand(-1, -1, 3)
        return points.gather(1, first_kept), normals.gather(1, first_kept)

    def _draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Uniform points on the parts' surfaces, outward normals, and whether each point is on its solid's surface."""
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
        """Uniform points on the parts' surfaces from uniform numbers `(4, 2 * batch, points)`, and their normals.

        Both are `(2, batch, points, 3)`, and 0 where a solid has no second part.
        """
        points, normals = torch.zeros(2, *draw.shape[1:], 3)
        for group in self._groups:
            on_surface, outward = group.primitive.surface(draw[:, group.row], *group.size)
            points[group.row] = on_surface @ group.rotation.mT + group.centre
            normals[group.row] = outward @ group.rotation.mT
        return points.unflatten(0, (2, self.num_solids)), normals.unflatten(0, (2, self.num_solids))


class _Group:
    """The parts of one kind. `row` numbers all first parts, then all second parts."""

    def __init__(self, kind: str, parts: dict[int, Part], num_solids: int) -> None:
        self.primitive = PRIMITIVES[kind]
        self.row = torch.tensor(list(parts))
        self.solid = self.row % num_solids
        self.size = torch.tensor([part.size for part in parts.values()]).T[..., None].unbind()
        self.rotation = torch.tensor([part.rotation for part in parts.values()])
        self.centre = torch.tensor([[part.centre] for part in parts.values()])
