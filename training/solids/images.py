"""Images of the training solids as the conditioner gets them. They are rendered once and stored in files."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from models.families.hunyuan3d.conditioner import image_tensor
from models.families.hunyuan3d.preparation import ImageSettings, prepare_pixels
from models.request import BackgroundRemoval
from training.solids.rendering import render, render_surfaces
from training.solids.sampling import training_solids
from training.solids.solids import Solid, SolidBatch

SIDE = 112
CELLS = 32
"""Cells along each side of the maps that describe the content of an image."""

SETTINGS = ImageSettings(size=SIDE, border_ratio=0.15)
CHUNK = 512


def prepared(images: Tensor, settings: ImageSettings = SETTINGS) -> Tensor:
    """Prepare RGBA images `(batch, height, width, 4)` as in serving: `(batch, 3, size, size)` in [-1, 1]."""
    return torch.cat(
        [
            image_tensor(prepare_pixels(Image.fromarray(rgba.numpy()), settings, BackgroundRemoval.NEVER))
            for rgba in images
        ]
    )


def image_file(solid: Solid, look_seed: int, size: int = SIDE) -> bytes:
    """A solid's image as a client would send it: a PNG file with transparency."""
    file = BytesIO()
    Image.fromarray(render([solid], [look_seed], size)[0].numpy()).save(file, "PNG")
    return file.getvalue()


def training_images(folder: Path, count: int) -> Tensor:
    """Images of the first `count` training solids, `(count, 3, SIDE, SIDE)` uint8."""
    return _all_chunks(folder, "pictures", count, _draw_images)


def training_surface_maps(folder: Path, count: int) -> Tensor:
    """Surface position, normal and alpha in each cell of these images: `(count, 7, CELLS, CELLS)` uint8.

    0 to 255 stand for -1 to 1 in positions and normals.
    """
    return _all_chunks(folder, "surfaces", count, _draw_surface_maps)


def training_part_maps(folder: Path, count: int) -> Tensor:
    """The index of the part that each cell of these images shows, 0 or 1: `(count, 1, CELLS, CELLS)` uint8."""
    return _all_chunks(folder, "parts", count, partial(_draw_part_maps, folder))


def _draw_images(number: int) -> Tensor:
    start = number * CHUNK
    return _bytes(prepared(render(training_solids(start, CHUNK), range(start, start + CHUNK), SIDE)))


def _draw_surface_maps(number: int) -> Tensor:
    positions, normals = render_surfaces(training_solids(number * CHUNK, CHUNK), SIDE // 2)
    black = positions.clone()
    black[..., :3] = 0
    settings = replace(SETTINGS, size=CELLS)
    alpha = -prepared(black, settings)[:, :1]
    return _bytes(torch.cat((prepared(positions, settings), prepared(normals, settings), alpha), dim=1))


def _draw_part_maps(folder: Path, number: int) -> Tensor:
    maps = _chunk(folder, "surfaces", number, _draw_surface_maps)
    positions = maps[:, :3].flatten(2).mT / 127.5 - 1
    first, second = SolidBatch(training_solids(number * CHUNK, CHUNK)).part_distances(positions)
    return (second.abs() < first.abs()).to(torch.uint8).unflatten(1, (1, CELLS, CELLS))


def _bytes(values: Tensor) -> Tensor:
    return ((values + 1) * 127.5).round().to(torch.uint8)


def _all_chunks(folder: Path, name: str, count: int, draw: Callable[[int], Tensor]) -> Tensor:
    """The first `count` rows of the chunks `draw(0)`, `draw(1)`, and so on, which are stored in `folder`."""
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
