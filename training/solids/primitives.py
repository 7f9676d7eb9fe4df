"""The six primitives of solids in local coordinates: centred at 0, round ones about the y axis.

A primitive has three sizes `a, b, c`, tensors that broadcast with the coordinates:

- sphere: radius; box: three half sides; cylinder: radius, half height; cone: radius of base, half height, apex at +y;
- torus: radius of the ring, radius of the tube; capsule: radius, half the distance between the centres of its two ends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
SignedDistance = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Primitive:
    """The geometry of one kind of primitive.

    `signed_distance(x, y, z, a, b, c)` is exact and positive inside. `area(a, b, c)` is the area of the surface.
    `surface(draw, a, b, c)` maps four uniform numbers, `draw (4, parts, points)`, to points uniform by area and their
    outward normals, `(parts, points, 3)` each. `support(directions, a, b, c)` is the outermost point in each direction,
    `(parts, directions, 3)`; its sizes are `(parts, 1)`.
    """

    signed_distance: SignedDistance
    area: Callable[[Tensor, Tensor, Tensor], Tensor]
    surface: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    support: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _round(radius: Tensor, height: Tensor, angle: Tensor) -> Tensor:
    """Points in cylindrical coordinates: distance from the y axis, height along it, angle around it."""
    return torch.stack((radius * torch.cos(angle), height, radius * torch.sin(angle)), -1)


def _flat(directions: Tensor) -> Tensor:
    """The unit vectors perpendicular to the y axis that are nearest to `directions`."""
    across = directions * directions.new_tensor((1.0, 0.0, 1.0))
    return across / across.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def _rectangle(x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to a rectangle, positive inside, from the distances `x` and `y` beyond its two pairs of sides."""
    return -torch.maximum(x, y).clamp(max=0) - torch.hypot(x.clamp(min=0), y.clamp(min=0))


def _sphere_distance(x: Tensor, y: Tensor, z: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a - (x * x + y * y + z * z).sqrt()


def _sphere_surface(draw: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    height = 2 * draw[0] - 1
    normals = _round((1 - height * height).clamp(min=0).sqrt(), height, 2 * math.pi * draw[1])
    return a[..., None] * normals, normals


def _sphere_support(directions: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a[..., None] * directions


def _box_distance(x: Tensor, y: Tensor, z: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    x, y, z = x.abs() - a, y.abs() - b, z.abs() - c
    inside = torch.maximum(torch.maximum(x, y), z).clamp(max=0)
    x, y, z = x.clamp(min=0), y.clamp(min=0), z.clamp(min=0)
    return -inside - (x * x + y * y + z * z).sqrt()


def _box_surface(draw: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    half = torch.stack((a, b, c), -1)
    share = torch.stack((b * c, a * c, a * b), -1).cumsum(-1)
    axis = (draw[0, ..., None] * share[..., -1:] > share[..., :2]).sum(-1)
    place = 2 * draw[1:].movedim(0, -1) - 1
    is_across = torch.nn.functional.one_hot(axis, 3).bool()
    side = torch.where(place < 0, -1.0, 1.0)
    return torch.where(is_across, side, place) * half, torch.where(is_across, side, 0.0)


def _box_support(directions: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.where(directions < 0, -1.0, 1.0) * torch.stack((a, b, c), -1)


def _cylinder_distance(x: Tensor, y: Tensor, z: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return _rectangle((x * x + z * z).sqrt() - a, y.abs() - b)


def _cylinder_surface(draw: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    is_wall = draw[0] * (2 * b + a) < 2 * b
    angle, side = 2 * math.pi * draw[1], torch.where(draw[3] < 0.5, -1.0, 1.0)
    radius = torch.where(is_wall, a, a * draw[2].sqrt())
    height = torch.where(is_wall, (2 * draw[2] - 1) * b, side * b)
    return _round(radius, height, angle), _round(is_wall.float(), torch.where(is_wall, 0.0, side), angle)


def _cylinder_support(directions: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    support = a[..., None] * _flat(directions)
    support[..., 1] = torch.where(directions[..., 1] < 0, -b, b)
    return support


def _cone_distance(x: Tensor, y: Tensor, z: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    radius, height = (x * x + z * z).sqrt(), y + b  # the wall runs from the rim of the base to the apex along (-a, 2b)
    beyond = radius - a
    slant = (a * a + 4 * b * b).sqrt()
    along = ((2 * b * height - a * beyond) / slant).clamp(min=0).minimum(slant) / slant
    to_wall = torch.hypot(beyond + a * along, height - 2 * b * along)
    to_base = torch.hypot(beyond.clamp(min=0), height)
    is_inside = (height > 0) & (2 * b * beyond + a * height < 0)
    nearest = torch.minimum(to_wall, to_base)
    return torch.where(is_inside, nearest, -nearest)


def _cone_surface(draw: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    slant = (a * a + 4 * b * b).sqrt()
    is_wall = draw[0] * (slant + a) < slant
    angle, from_middle = 2 * math.pi * draw[1], draw[2].sqrt()
    height = torch.where(is_wall, b - 2 * b * from_middle, -b)
    normals = _round(torch.where(is_wall, 2 * b / slant, 0.0), torch.where(is_wall, a / slant, -1.0), angle)
    return _round(a * from_middle, height, angle), normals


def _cone_support(directions: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    rim = a[..., None] * _flat(directions)
    rim[..., 1] = -b
    apex = torch.zeros_like(rim)
    apex[..., 1] = b
    return torch.where(((apex - rim) * directions).sum(-1, keepdim=True) > 0, apex, rim)


def _torus_distance(x: Tensor, y: Tensor, z: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return b - torch.hypot((x * x + z * z).sqrt() - a, y)


def _torus_surface(draw: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    # The area up to the angle t around the tube grows as t + (b / a) sin t, which Newton's method inverts.
    share, turn = b / a, 2 * math.pi * (draw[0] - 0.5)
    angle = turn.clone()
    for _ in range(5):
        angle -= (angle + share * torch.sin(angle) - turn) / (1 + share * torch.cos(angle))
    around = 2 * math.pi * draw[1]
    cos, sin = torch.cos(angle), torch.sin(angle)
    return _round(a + b * cos, b * sin, around), _round(cos, sin, around)


def _torus_support(directions: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return a[..., None] * _flat(directions) + b[..., None] * directions


def _capsule_distance(x: Tensor, y: Tensor, z: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    beyond = (y.abs() - b).clamp(min=0)
    return a - (x * x + z * z + beyond * beyond).sqrt()


def _capsule_surface(draw: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    is_wall = draw[0] * (a + b) < b
    height = torch.where(is_wall, 0.0, 2 * draw[2] - 1)  # of the normal
    normals = _round((1 - height * height).clamp(min=0).sqrt(), height, 2 * math.pi * draw[1])
    points = a[..., None] * normals
    points[..., 1] += b * torch.where(is_wall, 2 * draw[2] - 1, torch.where(height < 0, -1.0, 1.0))
    return points, normals


def _capsule_support(directions: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    support = a[..., None] * directions
    support[..., 1] += torch.where(directions[..., 1] < 0, -b, b)
    return support


PRIMITIVES = {
    "sphere": Primitive(_sphere_distance, lambda a, b, c: 4 * math.pi * a * a, _sphere_surface, _sphere_support),
    "box": Primitive(_box_distance, lambda a, b, c: 8 * (a * b + b * c + c * a), _box_surface, _box_support),
    "cylinder": Primitive(
        _cylinder_distance, lambda a, b, c: 2 * math.pi * a * (a + 2 * b), _cylinder_surface, _cylinder_support
    ),
    "cone": Primitive(
        _cone_distance,
        lambda a, b, c: math.pi * a * (a + (a * a + 4 * b * b).sqrt()),
        _cone_surface,
        _cone_support,
    ),
    "torus": Primitive(_torus_distance, lambda a, b, c: 4 * math.pi**2 * a * b, _torus_surface, _torus_support),
    "capsule": Primitive(
        _capsule_distance, lambda a, b, c: 4 * math.pi * a * (a + b), _capsule_surface, _capsule_support
    ),
}


def half_sides(kind: str, size: Array) -> Array:
    """The half sides of the bounding box of an unrotated primitive."""
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
