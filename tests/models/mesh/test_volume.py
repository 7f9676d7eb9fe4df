from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from models.errors import EmptySurface
from models.mesh import size, volume
from models.mesh.surface import BOUNDS, extract_surface
from models.mesh.volume import (
    Field,
    decode_dense,
    decode_in_turns,
    finished,
    sample_in_turns,
)
from training.solids.sampling import sample_solids
from training.solids.solids import Solid, SolidBatch

CPU = torch.device("cpu")
POINTS_PER_CALL = 2**16


def clipped(distance: Callable[[Tensor], Tensor], saturation: float = 0.1) -> Field:
    """A field like a decoder's: it saturates away from the surface."""
    return lambda points: (distance(points) / saturation).clamp(-1, 1)


def ball(centre: tuple[float, float, float], radius: float) -> Callable[[Tensor], Tensor]:
    return lambda points: radius - (points - points.new_tensor(centre)).norm(dim=1)


def slab(thickness: float) -> Callable[[Tensor], Tensor]:
    """A slab across the whole grid, parallel to no axis."""
    normal = torch.tensor((0.36, 0.48, 0.8))
    return lambda points: thickness / 2 - (points @ normal).abs()


def bumpy_ball(points: Tensor) -> Tensor:
    return ball((0.2, -0.1, 0.0), 0.5)(points) + 0.1 * torch.sin(9 * points).prod(1)


def of(solid: Solid) -> Callable[[Tensor], Tensor]:
    batch = SolidBatch([solid])
    return lambda points: batch.signed_distance(points[None])[0]


class CountedField:
    def __init__(self, field: Field) -> None:
        self.field = field
        self.num_points = 0
        self.largest_call = 0

    def __call__(self, points: Tensor) -> Tensor:
        self.num_points += len(points)
        self.largest_call = max(self.largest_call, len(points))
        return self.field(points)


def dense(field: Field, octree_resolution: int, points_per_call: int = POINTS_PER_CALL) -> Tensor:
    return decode_dense(field, octree_resolution, points_per_call=points_per_call, device=CPU)


def fine(field: Field, octree_resolution: int, points_per_call: int = POINTS_PER_CALL) -> Tensor:
    return finished(decode_in_turns(field, octree_resolution, points_per_call=points_per_call, device=CPU))


def assert_same_surface(fine_grid: Tensor, dense_grid: Tensor) -> None:
    """Every vertex of the dense grid's mesh is one of the other's too, up to 0.01 voxel, and no face is missing."""
    expected, found = extract_surface(dense_grid.numpy()), extract_surface(fine_grid.numpy())
    distances, _ = cKDTree(found.vertices).query(expected.vertices)
    assert distances.max() < 0.01 * 2 * BOUNDS / (len(dense_grid) - 1)
    assert len(found.faces) == len(expected.faces)


def test_grid_points_fill_the_cube_from_border_to_border_with_x_first() -> None:
    grid = dense(lambda points: points @ torch.tensor((1.0, 10.0, 100.0)), 4)
    at = np.linspace(-BOUNDS, BOUNDS, 5)
    expected = at[:, None, None] + 10 * at[:, None] + 100 * at
    np.testing.assert_allclose(grid, expected, atol=1e-4)


@pytest.mark.parametrize("decode", [dense, fine])
def test_calls_are_no_larger_than_asked_for_and_their_size_changes_nothing(
    decode: Callable[[Field, int, int], Tensor],
) -> None:
    field = CountedField(clipped(ball((0.1, 0.0, 0.0), 0.5)))
    grid = decode(field, 128, 5000)
    assert field.largest_call == 5000
    torch.testing.assert_close(grid, decode(field, 128, 2**20), atol=0, rtol=0, equal_nan=True)


def test_coarse_to_fine_has_the_dense_grids_values_where_it_evaluates() -> None:
    field = clipped(of(sample_solids([3], held_out=True)[0]))
    fine_grid, dense_grid = fine(field, 160), dense(field, 160)
    is_known = ~fine_grid.isnan()
    assert 0.05 < is_known.float().mean() < 0.3
    assert torch.equal(fine_grid[is_known], dense_grid[is_known])


@pytest.mark.parametrize(
    "field",
    [
        clipped(ball((0.0, 0.0, 0.0), 1.0)),
        clipped(ball((0.31, -0.2, 0.13), 0.4)),
        ball((0.0, 0.0, 0.0), 0.7),
        clipped(ball((0.0, 0.0, 0.0), 0.7), saturation=0.01),
        clipped(lambda points: torch.maximum(ball((-0.5, 0, 0), 0.4)(points), ball((0.5, 0.1, 0), 0.05)(points))),
        clipped(lambda points: torch.minimum(ball((0, 0, 0), 0.8)(points), -ball((0, 0.1, 0), 0.3)(points))),
        clipped(slab(0.5)),
        clipped(slab(0.04)),
    ],
    ids=["unit", "small", "unclipped", "steep", "apart", "hollow", "cut off by the border", "thin"],
)
def test_coarse_to_fine_gives_the_dense_grids_surface(field: Field) -> None:
    assert_same_surface(fine(field, 128), dense(field, 128))


@pytest.mark.slow
@pytest.mark.parametrize(
    "solid", sample_solids(range(6)) + sample_solids(range(6), held_out=True), ids=lambda s: f"{s.operation}"
)
def test_coarse_to_fine_gives_the_dense_grids_surface_of_solids(solid: Solid) -> None:
    field = clipped(of(solid))
    assert_same_surface(fine(field, 128), dense(field, 128))


@pytest.mark.parametrize("octree_resolution", [1, 2, 3, 4, 5, 63, 64, 127, 128, 129, 130, 131, 143, 167])
def test_any_resolution_gives_the_dense_grids_surface(octree_resolution: int) -> None:
    """Two levels begin at 127 cells. Odd numbers cannot be halved: the last cell of the coarser level is smaller."""
    field = clipped(bumpy_ball, saturation=2.0)
    if octree_resolution < 4:
        assert torch.equal(fine(field, octree_resolution), dense(field, octree_resolution))
    else:
        assert_same_surface(fine(field, octree_resolution), dense(field, octree_resolution))


@pytest.mark.slow
def test_at_256_a_fifteenth_of_the_points_is_evaluated_and_the_surface_is_the_dense_grids() -> None:
    solid = sample_solids([5], held_out=True)[0]
    field = CountedField(clipped(of(solid)))
    fine_grid = fine(field, 256)
    assert field.num_points < 257**3 / 15
    assert_same_surface(fine_grid, dense(field, 256))


@pytest.mark.parametrize("octree_resolution", [129, 130, 131, 160])
def test_slabs_and_turns_do_not_change_the_grid(octree_resolution: int, monkeypatch: pytest.MonkeyPatch) -> None:
    field = clipped(bumpy_ball, saturation=2.0)
    whole = fine(field, octree_resolution, points_per_call=5000)
    monkeypatch.setattr(volume, "_SLAB_POINTS", 5 * octree_resolution**2)  # slabs of 4 planes
    turns = decode_in_turns(field, octree_resolution, points_per_call=5000, device=CPU)
    assert torch.equal(finished(turns).nan_to_num(9.0), whole.nan_to_num(9.0))


def test_each_turn_of_a_decoding_is_a_small_part_of_it() -> None:
    field, num_turns, most = CountedField(clipped(bumpy_ball, saturation=2.0)), 0, 0
    before = 0
    for _ in decode_in_turns(field, 160, points_per_call=5000, device=CPU):
        most, before = max(most, field.num_points - before), field.num_points
        num_turns += 1
    assert most == 5000
    assert num_turns > field.num_points / 5000


def test_samples_are_the_evaluated_points_of_a_grid() -> None:
    grid_logits = fine(clipped(bumpy_ball, saturation=2.0), 130)
    samples = finished(sample_in_turns(grid_logits))
    assert samples.index.dtype == np.int32
    assert 0 < len(samples.index) < grid_logits.numel() / 5
    np.testing.assert_array_equal(samples.grid_logits(), grid_logits.numpy())


@pytest.mark.parametrize("octree_resolution", [48, 96, 128, 160, 200])
def test_predicted_size_of_a_decoding_is_about_right(octree_resolution: int) -> None:
    field = CountedField(clipped(ball((0.0, 0.0, 0.0), 0.75)))
    mesh = extract_surface(fine(field, octree_resolution).numpy())
    assert size.num_field_points(octree_resolution) == pytest.approx(field.num_points, rel=0.3)
    assert size.num_faces(octree_resolution) == pytest.approx(len(mesh.faces), rel=0.3)


def test_another_level_moves_the_surface() -> None:
    field = clipped(ball((0.0, 0.0, 0.0), 0.5), saturation=1.0)
    fine_grid = finished(decode_in_turns(field, 128, points_per_call=POINTS_PER_CALL, device=CPU, iso_level=0.2))
    radii = np.linalg.norm(extract_surface(fine_grid.numpy(), iso_level=0.2).vertices, axis=1)
    np.testing.assert_allclose(radii, 0.3, atol=0.002)


@pytest.mark.parametrize("decode", [dense, fine])
def test_a_field_that_is_not_finite_is_refused(decode: Callable[[Field, int], Tensor]) -> None:
    def field(points: Tensor) -> Tensor:
        return ball((0.0, 0.0, 0.0), 0.5)(points).masked_fill(points[:, 0] > 0.99, torch.nan)

    with pytest.raises(EmptySurface, match="not finite"):
        decode(field, 128)


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_a_field_without_surface_is_refused_when_the_surface_is_extracted(value: float) -> None:
    grid = fine(lambda points: points.new_full((len(points),), value), 128)
    with pytest.raises(EmptySurface, match="never crosses"):
        extract_surface(grid.numpy())
