from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.solids.image_tasks import part_targets, surface_targets
from training.solids.images import training_part_maps, training_surface_maps
from training.solids.parts import PartDescriptions, describe
from training.solids.sampling import sample_solids
from training.solids.solids import Solid, SolidBatch
from training.solids.symmetry import NUM_SYMMETRIES, turn_points

_POSITION, _NORMAL = slice(0, 3), slice(3, 6)


@pytest.fixture(scope="module")
def solids() -> list[Solid]:
    """The first twelve training solids."""
    return sample_solids(range(12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for the maps of the solids, in one chunk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.solids.images.CHUNK", 12)
        yield tmp_path_factory.mktemp("solids")


@pytest.fixture(scope="module")
def surface_maps(folder: Path) -> Tensor:
    return training_surface_maps(folder, 12)


@pytest.fixture(scope="module")
def part_maps(folder: Path) -> Tensor:
    return training_part_maps(folder, 12)


def inverse(symmetry: int) -> int:
    """The symmetry that undoes `symmetry`. A quarter turn's inverse is the opposite quarter turn."""
    points = torch.tensor([[[0.1, 0.2, 0.3]]])
    turned = turn_points(points, torch.tensor([symmetry]))
    return next(s for s in range(NUM_SYMMETRIES) if torch.equal(turn_points(turned, torch.tensor([s])), points))


@pytest.mark.parametrize("symmetry", [0, 3, 6])
def test_surface_targets_are_positions_and_normals_on_the_turned_solid(
    solids: list[Solid], surface_maps: Tensor, symmetry: int
) -> None:
    batch, symmetries = SolidBatch(solids[3:5]), torch.tensor([symmetry, symmetry])
    targets, is_known = surface_targets(surface_maps[3:5], symmetries)
    assert targets.shape == (2, 64, 16, 6)
    assert 0.1 < is_known.float().mean() < 0.8
    undo = torch.tensor([inverse(symmetry)] * 2)
    positions, normals = (turn_points(targets[..., columns].flatten(1, 2), undo) for columns in (_POSITION, _NORMAL))
    known = is_known.flatten(1)
    assert batch.signed_distance(positions)[known].abs().mean() < 0.02
    outside = batch.signed_distance(positions + 0.08 * normals)[known]
    assert (outside < 0).float().mean() > 0.9
    # Patches and cells are ordered row by row.
    rows = targets[..., 1].mean((0, 2)).where(is_known.any(2).any(0), torch.nan)
    assert rows.nan_to_num(0)[:32].mean() > rows.nan_to_num(0)[32:].mean()


@pytest.mark.parametrize("symmetry", [0, 3, 6])
def test_part_targets_describe_the_turned_part_that_a_cell_shows(
    solids: list[Solid], surface_maps: Tensor, part_maps: Tensor, symmetry: int
) -> None:
    two = [i for i, solid in enumerate(solids) if solid.operation is not None][:3]
    symmetries = torch.full((3,), symmetry)
    kinds, vectors = describe([solids[i] for i in two])
    kinds_of_cells, vectors_of_cells = part_targets(part_maps[two], PartDescriptions(kinds, vectors), symmetries)
    targets, is_known = surface_targets(surface_maps[two], symmetries)
    assert vectors_of_cells.shape == (3, 64, 16, 5, 3)
    undo = torch.full((3,), inverse(symmetry))
    positions = turn_points(targets[..., _POSITION].flatten(1, 2), undo)
    distances = SolidBatch([solids[i] for i in two]).part_distances(positions).abs()
    for row in range(3):
        known = is_known[row]
        for slot in (0, 1):
            is_this = kinds_of_cells[row][known] == kinds[row, slot]
            assert is_this.any()
            # The target is the part whose surface the cell shows …
            assert distances[slot, row].view(64, 16)[known][is_this].mean() < 0.02
            # … and the part's centre, box and tip are turned with the image.
            centre, *box, tip = vectors_of_cells[row][known][is_this][0][:, None, None]
            torch.testing.assert_close(turn_points(centre, undo[:1])[0, 0], vectors[row, slot, 0])
            torch.testing.assert_close(turn_points(tip, undo[:1])[0, 0], vectors[row, slot, 4])
            matrix = torch.cat(box)[:, 0]
            turned_back = turn_points(turn_points(matrix[None], undo[:1]).mT, undo[:1])[0].mT
            torch.testing.assert_close(turned_back, vectors[row, slot, 1:4])
