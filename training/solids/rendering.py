"""Renders solids by sphere tracing: a camera on the z axis, one light, one colour, a transparent background.

Shading and a mild perspective are the only cues of depth.
"""

import colorsys
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.solids.solids import Solid, SolidBatch

CAMERA_DISTANCE = 4.3  # at this distance, a solid that fills its cube just fits into the field of view
FIELD_OF_VIEW = math.radians(30)

_CAMERA = torch.tensor((0.0, 0.0, CAMERA_DISTANCE))
_SUBPIXELS = 2  # along each side of a pixel
_BLOCK = 4  # subpixels along each side of a block, which is traced as one ray until it is near the surface
_NEAR_ENOUGH = 2e-3  # a fifth of a subpixel at 112 pixels
_MAX_STEPS = 128  # with 64, sides seen at a glancing angle lose a strip of a pixel or two


def render(solids: Sequence[Solid], look_seeds: Sequence[int], size: int = 112) -> Tensor:
    """Render solids; `look_seeds` determine colour and light. Returns `(batch, size, size, 4)` uint8, RGBA.

    Alpha is 0 around the solid, where the colour is white, and fractional along its outline. Colours are not multiplied
    by alpha. `size` must be even.
    """
    directions = _directions(size * _SUBPIXELS)
    images = []
    for solid, seed in zip(solids, look_seeds, strict=True):
        sight = _look(SolidBatch([solid]), directions)
        images.append(_image(sight, _shade(sight.normals, sight.directions, random.Random(f"look-{seed}"))))
    return torch.stack(images)


def render_surfaces(solids: Sequence[Solid], size: int) -> tuple[Tensor, Tensor]:
    """Render the positions and the normals of visible surfaces as colours; a channel's range is -1 to 1.

    Returns two batches of images like `render`'s, `(batch, size, size, 4)` uint8 each.
    """
    directions = _directions(size * _SUBPIXELS)
    sights = [_look(SolidBatch([solid]), directions) for solid in solids]
    positions = torch.stack([_image(sight, (sight.points + 1) / 2) for sight in sights])
    return positions, torch.stack([_image(sight, (sight.normals + 1) / 2) for sight in sights])


class _Sight(NamedTuple):
    """`is_hit` `(subpixels,)`, and for the subpixels that hit: ray direction, point and normal, `(hits, 3)` each."""

    is_hit: Tensor
    directions: Tensor
    points: Tensor
    normals: Tensor


def _directions(size: int) -> Tensor:
    """Unit vectors from the camera through the subpixels, `(blocks, subpixels of a block, 3)`."""
    across = ((torch.arange(size) + 0.5) * (2 / size) - 1) * math.tan(FIELD_OF_VIEW / 2)
    y, x = torch.meshgrid(-across, across, indexing="ij")
    rays = torch.nn.functional.normalize(torch.stack((x, y, -torch.ones_like(x)), -1), dim=-1)
    return rays.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK)).transpose(1, 2).flatten(0, 1).flatten(1, 2)


def _look(batch: SolidBatch, directions: Tensor) -> _Sight:
    distance = _distances(batch, directions)
    is_hit = distance.isfinite()
    directions, distance = directions.flatten(0, 1)[is_hit], distance[is_hit]
    points = _CAMERA + distance[:, None] * directions
    return _Sight(is_hit, directions, points, _normals(batch, points))


def _image(sight: _Sight, hit_colours: Tensor) -> Tensor:
    """The image `(size, size, 4)` uint8 from the colours `(hits, 3)` of the subpixels that hit."""
    colour = hit_colours.new_zeros(len(sight.is_hit), 4)
    colour[sight.is_hit, :3] = hit_colours
    colour[sight.is_hit, 3] = 1
    pixels = _BLOCK // _SUBPIXELS
    blocks = math.isqrt(len(sight.is_hit)) // _BLOCK
    colour = colour.reshape(blocks, blocks, pixels, _SUBPIXELS, pixels, _SUBPIXELS, 4).mean((3, 5))
    colour = colour.transpose(1, 2).reshape(blocks * pixels, blocks * pixels, 4)
    alpha = colour[..., 3:]
    rgb = torch.where(alpha > 0, colour[..., :3] / alpha.clamp(min=1e-6), 1.0)
    return (torch.cat((rgb, alpha), -1) * 255).round().to(torch.uint8)


def _distances(batch: SolidBatch, directions: Tensor) -> Tensor:
    """Distances to the solid along `directions (blocks, subpixels, 3)`: `(blocks * subpixels,)`, inf for a miss."""
    middle = torch.nn.functional.normalize(directions.mean(1), dim=-1)
    spread = float((directions - middle[:, None]).norm(dim=-1).max()) * (CAMERA_DISTANCE + 1)
    lower, upper = batch.bounds()
    to_lower, to_upper = (lower - spread - _CAMERA) / middle, (upper + spread - _CAMERA) / middle
    start, end = torch.minimum(to_lower, to_upper).amax(1), torch.maximum(to_lower, to_upper).amin(1)
    start = torch.where(start < end, start, torch.inf)
    start = _trace(batch, middle, start, end, keep_off=spread)
    start, end = (t[:, None].expand(-1, directions.shape[1]).flatten() for t in (start, end))
    return _trace(batch, directions.flatten(0, 1), start, end, keep_off=0)


def _trace(batch: SolidBatch, directions: Tensor, start: Tensor, end: Tensor, keep_off: float) -> Tensor:
    """Trace rays from `start` to `keep_off` before the surface. Returns `(rays,)`, inf if a ray passes `end`.

    Rays whose `start` is inf are left out.
    """
    found = torch.full_like(start, torch.inf)
    rays = start.isfinite().nonzero()[:, 0]
    directions, distance, end = directions.T[:, rays], start[rays], end[rays]
    for _ in range(_MAX_STEPS):
        points = _CAMERA[:, None] + distance * directions
        step = -batch.signed_distance(points.T[None])[0] - keep_off
        distance = distance + step
        is_near = step < _NEAR_ENOUGH + keep_off / 2
        found[rays[is_near]] = distance[is_near]
        going = (~is_near & (distance < end)).nonzero()[:, 0]
        if len(going) == 0:
            break
        rays, directions, distance, end = rays[going], directions[:, going], distance[going], end[going]
    return found


def _normals(batch: SolidBatch, points: Tensor) -> Tensor:
    """Outward unit normals at points `(points, 3)` near the surface, from differences at a tetrahedron's corners."""
    corners = points.new_tensor(((1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)))
    around = points[:, None] + 2e-3 * corners
    distance = batch.signed_distance(around.flatten(0, 1)[None]).unflatten(1, (-1, 4))[0]
    return torch.nn.functional.normalize(-distance @ corners, dim=-1)


def _shade(normals: Tensor, directions: Tensor, rng: random.Random) -> Tensor:
    """Colours `(points, 3)` in [0, 1], seen along `directions`: ambient, diffuse and weak specular light."""
    albedo = normals.new_tensor(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.8), rng.uniform(0.6, 0.95)))
    tilt, turn = math.radians(rng.uniform(15, 50)), rng.uniform(0, 2 * math.pi)
    light = normals.new_tensor((math.sin(tilt) * math.cos(turn), math.sin(tilt) * math.sin(turn), math.cos(tilt)))
    halfway = torch.nn.functional.normalize(light - directions, dim=-1)
    diffuse = (normals @ light).clamp(min=0)
    specular = (normals * halfway).sum(-1).clamp(min=0) ** 30
    # A weak light at the camera, so that every visible surface has shading.
    facing = -(normals * directions).sum(-1)
    strength = 0.2 + 0.3 * facing + 0.5 * diffuse
    return (strength[:, None] * albedo + 0.2 * specular[:, None]).clamp(0, 1)
