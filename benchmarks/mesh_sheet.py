"""A sheet of solids, their images, and the meshes generated from these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from benchmarks.mesh_images import draw_mesh
from models.mesh.surface import Mesh, extract_surface
from models.mesh.volume import decode_in_turns, finished
from training.solids.solids import Solid, SolidBatch

_SIDE = 192
_GAP = 12
_LINE = 20
_INK = (30, 30, 30)


@dataclass(frozen=True, slots=True)
class Cell:
    """One mesh, None if its field had no surface, and the text under it."""

    mesh: Mesh | None
    text: str


def draw_sheet(
    solids: Sequence[Solid], images: Sequence[Image.Image], columns: Mapping[str, Sequence[Cell]]
) -> Image.Image:
    """One row per solid: its RGBA image, its true shape, and a cell of each column. Keys of `columns` are headings."""
    all_columns = {
        "image": [(_on_white(image), "") for image in images],
        "true solid": [(draw_mesh(_mesh_of(solid), _SIDE), _name(solid)) for solid in solids],
        **{heading: [(_drawn(cell.mesh), cell.text) for cell in cells] for heading, cells in columns.items()},
    }
    row_height = _SIDE + 2 * _LINE + _GAP
    top = _GAP + 2 * _LINE
    sheet = Image.new("RGB", (_GAP + len(all_columns) * (_SIDE + _GAP), top + len(solids) * row_height), "white")
    ink, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, (heading, cells) in enumerate(all_columns.items()):
        left = _GAP + number * (_SIDE + _GAP)
        ink.multiline_text((left, _GAP), heading, _INK, font)
        for row, (image, text) in enumerate(cells):
            sheet.paste(image, (left, top + row * row_height))
            ink.multiline_text((left, top + row * row_height + _SIDE), text, _INK, font)
    return sheet


def _drawn(mesh: Mesh | None) -> Image.Image:
    return draw_mesh(mesh, _SIDE) if mesh else Image.new("RGB", (_SIDE, _SIDE), "white")


def _on_white(image: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", image.size, "white")
    sheet.paste(image, mask=image.getchannel("A"))
    return sheet.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)


def _name(solid: Solid) -> str:
    first, *others = (part.kind for part in solid.parts)
    return " ".join([first, *(f"{solid.operation} {kind}" for kind in others)])


def _mesh_of(solid: Solid) -> Mesh:
    batch = SolidBatch([solid])
    grid_logits = finished(
        decode_in_turns(
            lambda points: batch.signed_distance(points[None])[0],
            192,
            points_per_call=2**15,
            device=torch.device("cpu"),
        )
    )
    return extract_surface(grid_logits.numpy())
