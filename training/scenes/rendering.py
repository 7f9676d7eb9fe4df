"""Draws batches of scenes with torch, from signed distances, anti-aliased over about one pixel."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from training.scenes.scenes import COLOURS, MAX_OBJECTS, POSITIONS, SHAPES, SIZES, TEXTURES, TONES, Scene, SceneObject

_RGB = {
    "red": (0.86, 0.10, 0.12),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.12, 0.22, 0.86),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.56, 0.14, 0.66),
    "cyan": (0.12, 0.80, 0.86),
    "white": (0.98, 0.98, 0.98),
    "black": (0.03, 0.03, 0.03),
}
_TONE_LEVEL = {"light": 0.76, "grey": 0.52, "dark": 0.27}
_PLACE = {  # centre of the object in [-1, 1], x points right and y down
    "top left": (-0.5, -0.5),
    "top right": (0.5, -0.5),
    "bottom left": (-0.5, 0.5),
    "bottom right": (0.5, 0.5),
    "centre": (0.0, 0.0),
}
_NUM_DRAWS = 64  # random numbers for a scene: 8 for the background, 8 for each object
_RADIUS = {"small": 0.21, "large": 0.39}


def render(scenes: Sequence[Scene], size: int = 128) -> Tensor:
    """Draw scenes. Returns `(batch, 3, size, size)` float32 in [-1, 1]."""
    generators = [_generator(scene) for scene in scenes]
    noise = torch.stack([torch.rand(_NUM_DRAWS, generator=g) for g in generators])
    x, y = _grid(size)
    canvas = _backgrounds(scenes, noise, x, y, generators)
    for slot, shape, rows in _objects_of_a_kind(scenes):
        objects = [scenes[i].objects[slot] for i in rows]
        canvas[rows] = _paint(shape, objects, noise[rows, 8 + 8 * slot : 16 + 8 * slot], canvas[rows], x, y)
    return canvas.clamp(0, 1) * 2 - 1


def object_map(scenes: Sequence[Scene], cells: int) -> Tensor:
    """The index of the object that fills each cell of a grid, `(batch, cells, cells)`; -1 for the background."""
    noise = torch.stack([torch.rand(_NUM_DRAWS, generator=_generator(scene)) for scene in scenes])
    x, y = _grid(4 * cells)
    covered = torch.zeros(len(scenes), MAX_OBJECTS, cells, cells)
    for slot, shape, rows in _objects_of_a_kind(scenes):
        objects = [scenes[i].objects[slot] for i in rows]
        cover = _cover(shape, objects, noise[rows, 8 + 8 * slot : 16 + 8 * slot], x, y)
        covered[rows, slot] = torch.nn.functional.avg_pool2d(cover[:, None], 4)[:, 0]
    share, fullest = covered.max(1)
    return torch.where(share > 0.2, fullest, -1)


def _generator(scene: Scene) -> torch.Generator:
    """One generator for each scene, so that an image does not depend on its batch."""
    return torch.Generator().manual_seed(scene.seed * 7919 + 17)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    y, x = torch.meshgrid(*(2 * [(torch.arange(size) + 0.5) * (2 / size) - 1]), indexing="ij")
    return x, y


def _objects_of_a_kind(scenes: Sequence[Scene]) -> Iterator[tuple[int, str, list[int]]]:
    for slot in range(MAX_OBJECTS):
        for shape in SHAPES:
            rows = [i for i, s in enumerate(scenes) if slot < len(s.objects) and s.objects[slot].shape == shape]
            if rows:
                yield slot, shape, rows


def _backgrounds(
    scenes: Sequence[Scene], noise: Tensor, x: Tensor, y: Tensor, generators: list[torch.Generator]
) -> Tensor:
    level = torch.tensor([_TONE_LEVEL[scene.tone] for scene in scenes])
    base = level[:, None] + (noise[:, 0:1] - 0.5) * 0.08 + (noise[:, 1:4] - 0.5) * 0.12
    canvas = base[:, :, None, None].expand(-1, -1, *x.shape).clone()
    for kind, pattern in (("striped", _stripes), ("dotted", _dots)):
        rows = [i for i, scene in enumerate(scenes) if scene.texture == kind]
        if rows:
            canvas[rows] += 0.11 * pattern(noise[rows], x, y)[:, None]
    rows = [i for i, scene in enumerate(scenes) if scene.texture == "busy"]
    for i in rows:
        canvas[i] += _clutter(generators[i], x)
    return canvas


def _stripes(noise: Tensor, x: Tensor, y: Tensor) -> Tensor:
    angle, frequency = noise[:, 4] * math.pi, 11 + 8 * noise[:, 5]
    along = x * torch.cos(angle)[:, None, None] + y * torch.sin(angle)[:, None, None]
    wave = torch.sin(along * frequency[:, None, None] + 6.28 * noise[:, 6, None, None])
    return (wave * 3).clamp(-1, 1)


def _dots(noise: Tensor, x: Tensor, y: Tensor) -> Tensor:
    frequency = (11 + 6 * noise[:, 5])[:, None, None]
    wave = torch.sin(x * frequency + 6.28 * noise[:, 6, None, None]) * torch.sin(
        y * frequency + 6.28 * noise[:, 7, None, None]
    )
    return ((wave.abs() - 0.55) * 5).clamp(-0.4, 1)


def _clutter(generator: torch.Generator, x: Tensor) -> Tensor:
    """Soft coloured patches at two scales, the hardest background to generate. `(3, size, size)`."""
    total = torch.zeros(3, *x.shape)
    for cells, strength in ((4, 0.10), (8, 0.09)):
        grid = torch.rand(1, 3, cells, cells, generator=generator) - 0.5
        grid = 0.55 * grid.mean(1, keepdim=True) * 3 + 0.45 * grid
        total += strength * 2 * torch.nn.functional.interpolate(grid, size=x.shape, mode="bicubic")[0]
    return total


def _paint(shape: str, objects: list[SceneObject], draw: Tensor, canvas: Tensor, x: Tensor, y: Tensor) -> Tensor:
    rgb = torch.tensor([_RGB[o.colour] for o in objects]) + (draw[:, 4:7] - 0.5) * 0.05
    return torch.lerp(canvas, rgb[:, :, None, None], _cover(shape, objects, draw, x, y)[:, None])


def _cover(shape: str, objects: list[SceneObject], draw: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The share of each pixel that the objects cover, `(batch, size, size)`; `draw` holds their random numbers."""
    place = torch.tensor([_PLACE[o.position] for o in objects]) + (draw[:, 0:2] - 0.5) * 0.12
    radius = (torch.tensor([_RADIUS[o.size] for o in objects]) * (0.93 + 0.14 * draw[:, 2]))[:, None, None]
    angle = (draw[:, 3] - 0.5) * 0.5
    dx, dy = (x - place[:, 0, None, None]) / radius, (y - place[:, 1, None, None]) / radius
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    distance = _signed_distance(shape, dx * cos + dy * sin, dy * cos - dx * sin) * radius
    return (0.5 - distance * (x.shape[-1] / 3)).clamp(0, 1)  # the edge is 1.5 pixels wide


def _signed_distance(shape: str, u: Tensor, v: Tensor) -> Tensor:
    """Distance to the outline of a shape of about unit radius, negative inside; `v` points down."""
    match shape:
        case "circle":
            return torch.hypot(u, v) - 0.92
        case "square":
            return torch.maximum(u.abs(), v.abs()) - 0.82
        case "triangle":
            return torch.maximum(v - 0.65, 0.866 * u.abs() - 0.5 * v - 0.45)
        case "cross":
            u, v = u.abs(), v.abs()
            return torch.minimum(torch.maximum(u - 0.96, v - 0.3), torch.maximum(u - 0.3, v - 0.96))
        case "ring":
            return (torch.hypot(u, v) - 0.72).abs() - 0.24
    raise ValueError(f"shape {shape!r} is not one of {SHAPES}")


def attribute_targets(scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """The attributes of scenes as class indices, for the judge and the text encoders.

    `shape`, `colour` and `size` are `(batch, positions)`, `tone` and `texture` `(batch,)`. At an empty position the
    shape is `len(SHAPES)`, colour and size are -100.
    """
    shape = torch.full((len(scenes), len(POSITIONS)), len(SHAPES))
    colour, extent = torch.full_like(shape, -100), torch.full_like(shape, -100)
    for i, scene in enumerate(scenes):
        for thing in scene.objects:
            place = POSITIONS.index(thing.position)
            shape[i, place] = SHAPES.index(thing.shape)
            colour[i, place] = COLOURS.index(thing.colour)
            extent[i, place] = SIZES.index(thing.size)
    return {
        "shape": shape,
        "colour": colour,
        "size": extent,
        "tone": torch.tensor([TONES.index(scene.tone) for scene in scenes]),
        "texture": torch.tensor([TEXTURES.index(scene.texture) for scene in scenes]),
    }
