import numpy as np
import pytest
import torch
import trimesh

from benchmarks.mesh_images import draw_mesh
from models.mesh.surface import Mesh, extract_surface
from models.mesh.volume import decode_dense
from training.solids.rendering import render
from training.solids.sampling import sample_solids
from training.solids.solids import SolidBatch

RED = np.array((0.8, 0.2, 0.2)) * 255


def mesh_of(body: trimesh.Trimesh) -> Mesh:
    return Mesh(np.asarray(body.vertices, np.float32), np.asarray(body.faces, np.int32))


@pytest.mark.parametrize("seed", range(3))
def test_mesh_of_a_solid_covers_the_pixels_of_its_image(seed: int) -> None:
    solid = sample_solids([seed], held_out=True)[0]
    batch = SolidBatch([solid])
    grid = decode_dense(
        lambda points: batch.signed_distance(points[None])[0], 128, points_per_call=2**17, device=torch.device("cpu")
    )
    drawn = np.asarray(draw_mesh(extract_surface(grid.numpy()), 112))
    is_object = render([solid], [0])[0, :, :, 3].numpy() > 127
    assert ((drawn < 250).any(axis=2) == is_object).mean() > 0.985


def test_axes_point_up_and_right_and_the_nearer_part_hides_the_farther() -> None:
    near = trimesh.creation.icosphere(radius=0.3).apply_translation((0.4, 0.5, 0.3))
    behind = trimesh.creation.icosphere(radius=0.1).apply_translation((0.4, 0.5, -0.5))
    alone = np.asarray(draw_mesh(mesh_of(near), 64))
    rows, columns = np.nonzero((alone < 250).any(axis=2))
    assert rows.mean() < 28
    assert columns.mean() > 36
    np.testing.assert_array_equal(np.asarray(draw_mesh(mesh_of(near + behind), 64)), alone)


def test_inner_sides_are_red_and_not_visible_on_a_closed_mesh() -> None:
    ball = trimesh.creation.icosphere()
    drawn = np.asarray(draw_mesh(mesh_of(ball), 32)).astype(float)
    assert (np.abs(drawn - RED).max(axis=2) > 20).all()
    ball.invert()
    inverted = np.asarray(draw_mesh(mesh_of(ball), 32)).astype(float)
    assert np.abs(inverted[16, 16] - RED).max() < 1
