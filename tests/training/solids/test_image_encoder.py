from pathlib import Path

import pytest
import torch

from training.solids.image_encoder import (
    CHANNELS,
    Probe,
    build_conditioner,
    draw_weights,
    part_targets,
    surface_targets,
    turn_pictures,
    turn_points,
)
from training.solids.images import SIDE, picture_file, prepared, training_parts, training_surfaces
from training.solids.parts import Parts, describe
from training.solids.rendering import render
from training.solids.solids import Solid, SolidBatch, sample_solids


@pytest.fixture(scope="module")
def solids() -> list[Solid]:
    return sample_solids([3, 4])


def silhouette(points: torch.Tensor, batch: SolidBatch, side: int) -> torch.Tensor:
    """Whether any of the points behind a pixel are inside, `(batch, side, side)`."""
    inside = batch.signed_distance(points) > 0
    return inside.unflatten(1, (side, side, -1)).any(-1)


def test_single_primitives_are_an_eighth_of_what_is_shown() -> None:
    solids = sample_solids(range(50))
    weights = draw_weights(solids)
    is_single = torch.tensor([solid.operation is None for solid in solids])
    assert weights[is_single].sum() == pytest.approx(1 / 8)
    assert weights[~is_single].sum() == pytest.approx(7 / 8)
    assert [len(set(part.tolist())) for part in (weights[is_single], weights[~is_single])] == [1, 1]


@pytest.mark.parametrize("way", range(8))
def test_a_turned_picture_is_that_of_the_turned_solid(solids: list[Solid], way: int) -> None:
    """Told by parallel projections of the inside, whose axes are those of pictures: row down, column right."""
    # Given a grid of points behind pixels, and what they show
    side, batch = 24, SolidBatch(solids)
    middles = (torch.arange(side) + 0.5) * (2 / side) - 1
    y, x, z = torch.meshgrid(-middles, middles, middles, indexing="ij")
    points = torch.stack((x, y, z), -1).flatten(0, 2).expand(2, -1, 3)
    picture = silhouette(points, batch, side)[:, None].float().expand(-1, 3, -1, -1)
    # When both are turned
    ways = torch.tensor([way, way])
    turned, places = turn_pictures(picture, ways), turn_points(points, ways)
    # Then what the turned points say of the solid, sorted by where they now stand, is the turned picture
    inside = (batch.signed_distance(points) > 0).float()
    column = ((places[..., 0] + 1) / 2 * side).long()
    row = ((1 - places[..., 1]) / 2 * side).long()
    seen = torch.zeros(2, side * side).scatter_reduce(1, row * side + column, inside, "amax")
    assert torch.equal(seen.view(2, side, side), turned[:, 0])


@torch.no_grad()
def test_new_encoder_sees_where_a_token_stands_and_gives_one_for_each_patch() -> None:
    conditioner = build_conditioner()
    tokens = conditioner(torch.rand(2, 3, SIDE, SIDE) * 2 - 1)
    assert tokens.shape == (2, 65, CHANNELS)
    assert tokens.std() > 0.5
    probe = Probe()
    points = torch.tensor([[[-0.9, 0.9, 0.0], [0.9, -0.9, 0.0]]]).expand(2, -1, -1)
    before = probe(tokens, points)
    # The patch in the upper left corner; but for where it stands it shows something else.
    tokens[:, 1, 8:] += torch.randn(CHANNELS - 8, generator=torch.Generator().manual_seed(0))
    change = (probe(tokens, points) - before).abs()
    assert (change[:, 0] > 2 * change[:, 1]).all()


def test_prepared_pictures_show_the_object_in_the_middle_on_white(solids: list[Solid]) -> None:
    pictures = prepared(render(solids, [1, 2], SIDE))
    assert pictures.shape == (2, 3, SIDE, SIDE)
    shown = pictures.amin(1) < 0.99
    for rows in (shown.any(2), shown.any(1)):
        first, last = rows.float().argmax(1), SIDE - 1 - rows.flip(1).float().argmax(1)
        assert ((first + last - SIDE + 1).abs() <= 2).all()
    assert picture_file(solids[0], 1).startswith(b"\x89PNG")


@pytest.mark.parametrize("way", [0, 3, 6])
def test_surface_targets_are_places_on_the_turned_solid(
    solids: list[Solid], way: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.solids.images.CHUNK", 5)
    maps = training_surfaces(tmp_path, 5)[3:]  # of the same seeds as the solids
    ways = torch.tensor([way, way])
    targets, is_known = surface_targets(maps, ways)
    assert targets.shape == (2, 64, 16, 6)
    assert 0.1 < is_known.float().mean() < 0.8
    # The symmetry's own inverse but for quarter turns, which turn back the other way.
    batch, inverse = SolidBatch(solids), next(w for w in range(8) if _undoes(w, way))
    places, normals = (
        turn_points(targets[..., part].flatten(1, 2), torch.tensor([inverse] * 2)) for part in (_PLACE, _NORMAL)
    )
    known = is_known.flatten(1)
    assert batch.signed_distance(places)[known].abs().mean() < 0.02
    outside = batch.signed_distance(places + 0.08 * normals)[known]
    assert (outside < 0).float().mean() > 0.9
    # Patches and cells come row by row.
    rows = targets[..., 1].mean((0, 2)).where(is_known.any(2).any(0), torch.nan)
    assert rows.nan_to_num(0)[:32].mean() > rows.nan_to_num(0)[32:].mean()


@pytest.mark.parametrize("way", [0, 3, 6])
def test_part_targets_are_the_part_that_a_cell_shows_turned(
    way: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.solids.images.CHUNK", 12)
    solids = sample_solids(range(12))
    two = [i for i, solid in enumerate(solids) if solid.operation is not None][:3]
    ways = torch.full((3,), way)
    shown, maps = (draw(tmp_path, 12)[two] for draw in (training_parts, training_surfaces))
    kinds, vectors = describe([solids[i] for i in two])
    of_cells, measures = part_targets(shown, Parts(kinds, vectors), ways)
    targets, is_known = surface_targets(maps, ways)
    assert measures.shape == (3, 64, 16, 5, 3)
    undo = torch.full((3,), next(w for w in range(8) if _undoes(w, way)))
    places = turn_points(targets[..., :3].flatten(1, 2), undo)
    distances = SolidBatch([solids[i] for i in two]).part_distances(places).abs()
    for row in range(3):
        seen = is_known[row]
        for slot in (0, 1):
            is_this = of_cells[row][seen] == kinds[row, slot]
            assert is_this.any()
            # The part that is named is the one whose surface is there …
            assert distances[slot, row].view(64, 16)[seen][is_this].mean() < 0.02
            # … and its box and its tip are turned with the picture.
            centre, *box, tip = measures[row][seen][is_this][0][:, None, None]
            torch.testing.assert_close(turn_points(centre, undo[:1])[0, 0], vectors[row, slot, 0])
            torch.testing.assert_close(turn_points(tip, undo[:1])[0, 0], vectors[row, slot, 4])
            matrix = torch.cat(box)[:, 0]
            around = turn_points(turn_points(matrix[None], undo[:1]).mT, undo[:1])[0].mT
            torch.testing.assert_close(around, vectors[row, slot, 1:4])


_PLACE, _NORMAL = slice(0, 3), slice(3, 6)


def _undoes(way: int, other: int) -> bool:
    points = torch.tensor([[[0.1, 0.2, 0.3]]])
    there = turn_points(points, torch.tensor([other]))
    return torch.equal(turn_points(there, torch.tensor([way])), points)
