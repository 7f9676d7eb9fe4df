import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from models.errors import EmptySurface
from models.mesh.surface import BOUNDS, Mesh, extract_surface

Grid = NDArray[np.float32]


def ball(
    num_cells: int, radius: float, centre: tuple[float, float, float] = (0, 0, 0), saturation: float = 0.1
) -> Grid:
    """A clipped signed distance, as Hunyuan3D's field is."""
    axes = np.meshgrid(*[np.linspace(-BOUNDS, BOUNDS, num_cells + 1)] * 3, indexing="ij")
    distance = radius - np.sqrt(sum((axis - middle) ** 2 for axis, middle in zip(axes, centre, strict=True)))
    return (distance / saturation).clip(-1, 1).astype(np.float32)


def as_body(mesh: Mesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)


@pytest.mark.parametrize("num_cells", [48, 64, 101])
def test_a_unit_sphere_is_right_to_a_tenth_of_a_voxel(num_cells: int) -> None:
    mesh = extract_surface(ball(num_cells, 1.0))
    voxel = 2 * BOUNDS / num_cells
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    np.testing.assert_allclose((low + high) / 2, 0, atol=0.1 * voxel)
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), 1, atol=0.1 * voxel)


@given(
    st.integers(40, 64),
    st.floats(0.3, 0.6),
    st.tuples(*[st.floats(-0.3, 0.3)] * 3),
)
@settings(max_examples=25, deadline=None)
def test_centre_and_radius_of_a_sphere_are_right_to_a_tenth_of_a_voxel(
    num_cells: int, radius: float, centre: tuple[float, float, float]
) -> None:
    mesh = extract_surface(ball(num_cells, radius, centre, saturation=0.2))
    voxel = 2 * BOUNDS / num_cells
    np.testing.assert_allclose(as_body(mesh).center_mass, centre, atol=0.1 * voxel)
    distances = np.linalg.norm(mesh.vertices - np.array(centre), axis=1)
    np.testing.assert_allclose(distances, radius, atol=0.1 * voxel)


def test_axes_keep_their_order() -> None:
    grid = np.full((17, 17, 17), -1, np.float32)
    grid[2, 8, 15] = 1
    middle = extract_surface(grid).vertices.mean(axis=0)
    np.testing.assert_allclose(middle, np.array([2, 8, 15]) / 16 * 2 * BOUNDS - BOUNDS, atol=1e-6)


def test_faces_look_outward_and_leave_no_hole() -> None:
    body = as_body(extract_surface(ball(32, 0.7, (0.1, 0.2, -0.1))))
    assert body.is_watertight
    assert body.is_winding_consistent
    assert body.volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.02)


def test_arrays_have_the_types_that_files_have() -> None:
    mesh = extract_surface(ball(16, 0.7))
    assert mesh.vertices.dtype == np.float32
    assert mesh.faces.dtype == np.int32
    assert mesh.faces.flags.c_contiguous


def test_points_not_evaluated_away_from_the_surface_change_nothing() -> None:
    grid = ball(48, 0.7)
    known = np.where(np.abs(grid) < 1, grid, np.nan)
    full, partial = extract_surface(grid), extract_surface(known)
    np.testing.assert_array_equal(partial.vertices, full.vertices)
    np.testing.assert_array_equal(partial.faces, full.faces)


def test_cells_with_a_point_not_evaluated_are_left_out() -> None:
    grid = ball(48, 0.7)
    grid[:24] = np.nan
    mesh = extract_surface(grid)
    assert np.isfinite(mesh.vertices).all()
    assert mesh.vertices[:, 0].min() >= -1e-6
    assert not as_body(mesh).is_watertight


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_solid_cut_off_by_the_border_is_closed_flat_there(axis: int, sign: int) -> None:
    centre = np.zeros(3)
    centre[axis] = sign * BOUNDS
    body = as_body(extract_surface(ball(40, 0.5, (centre[0], centre[1], centre[2]))))
    assert body.is_watertight
    assert body.volume == pytest.approx(2 / 3 * np.pi * 0.5**3, rel=0.03)
    assert sign * body.vertices[:, axis].max() <= BOUNDS
    assert (sign * body.vertices[:, axis]).max() == pytest.approx(BOUNDS, abs=1e-6)


def test_another_level_moves_the_surface() -> None:
    mesh = extract_surface(ball(48, 0.5, saturation=1), iso_level=0.2)
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), 0.3, atol=0.005)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_a_field_all_on_one_side_has_no_surface(value: float) -> None:
    with pytest.raises(EmptySurface, match=r"field lies in \[.*\] and never crosses 0"):
        extract_surface(np.full((9, 9, 9), value, np.float32))
