"""Pictures of the training solids as the conditioner sees them, drawn once and kept in files."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from models.families.hunyuan3d.preparation import ImageSettings, prepare_image
from models.request import BackgroundRemoval
from training.solids.rendering import render, render_surfaces
from training.solids.solids import Solid, SolidBatch, training_solids

SIDE = 112
CELLS = 32
"""A side, of the maps that say what a picture shows."""

SETTINGS = ImageSettings(size=SIDE, border_ratio=0.15)
CHUNK = 512


def prepared(pictures: Tensor, settings: ImageSettings = SETTINGS) -> Tensor:
    """RGBA pictures `(batch, height, width, 4)` as serving prepares them: `(batch, 3, size, size)`, in [-1, 1]."""
    return torch.cat(
        [prepare_image(Image.fromarray(rgba.numpy()), settings, BackgroundRemoval.NEVER) for rgba in pictures]
    )


def picture_file(solid: Solid, look_seed: int, size: int = SIDE) -> bytes:
    """A solid's picture as a client would send it: a PNG file with transparency."""
    file = BytesIO()
    Image.fromarray(render([solid], [look_seed], size)[0].numpy()).save(file, "PNG")
    return file.getvalue()


def training_pictures(folder: Path, count: int) -> Tensor:
    """Pictures of the first `count` training solids, `(count, 3, SIDE, SIDE)` uint8."""
    return _of_all(folder, "pictures", count, _draw_pictures)


def training_surfaces(folder: Path, count: int) -> Tensor:
    """What those show, `(count, 7, CELLS, CELLS)` uint8: place and normal, 0 to 255 being -1 to 1, and alpha."""
    return _of_all(folder, "surfaces", count, _draw_surfaces)


def training_parts(folder: Path, count: int) -> Tensor:
    """Which of its parts is seen in each cell of those, 0 or 1, `(count, 1, CELLS, CELLS)` uint8."""
    return _of_all(folder, "parts", count, partial(_tell_parts, folder))


def _draw_pictures(number: int) -> Tensor:
    start = number * CHUNK
    return _bytes(prepared(render(training_solids(start, CHUNK), range(start, start + CHUNK), SIDE)))


def _draw_surfaces(number: int) -> Tensor:
    places, normals = render_surfaces(training_solids(number * CHUNK, CHUNK), SIDE // 2)
    black = places.clone()
    black[..., :3] = 0
    settings = replace(SETTINGS, size=CELLS)
    alpha = -prepared(black, settings)[:, :1]
    return _bytes(torch.cat((prepared(places, settings), prepared(normals, settings), alpha), dim=1))


def _tell_parts(folder: Path, number: int) -> Tensor:
    maps = _chunk(folder, "surfaces", number, _draw_surfaces)
    places = maps[:, :3].flatten(2).mT / 127.5 - 1
    first, second = SolidBatch(training_solids(number * CHUNK, CHUNK)).part_distances(places)
    return (second.abs() < first.abs()).to(torch.uint8).unflatten(1, (1, CELLS, CELLS))


def _bytes(values: Tensor) -> Tensor:
    return ((values + 1) * 127.5).round().to(torch.uint8)


def _of_all(folder: Path, name: str, count: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Chunks 0, 1, … of what `draw` makes, kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = [_chunk(folder, name, number, draw) for number in tqdm(range(-(-count // CHUNK)), desc=name)]
    return torch.cat(chunks)[:count]


def _chunk(folder: Path, name: str, number: int, draw: Callable[[int], Tensor]) -> Tensor:
    path = folder / f"{name}-{number:03d}.pt"
    if not path.exists():
        unfinished = path.with_suffix(".partial")
        torch.save(draw(number), unfinished)
        unfinished.replace(path)
    chunk: Tensor = torch.load(path, weights_only=True, mmap=True)
    return chunk
