from functools import cache

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import EmptySurface
from models.mesh.cleanup import CleanMesh, clean
from models.mesh.surface import Mesh, extract_surface
from models.request import MIN_TARGET_FACES
from training.solids.sampling import sample_solids
from training.solids.solids import Solid, SolidBatch


def as_mesh(*bodies: trimesh.Trimesh) -> Mesh:
    body = trimesh.util.concatenate([*bodies])
    assert isinstance(body, trimesh.Trimesh)
    return Mesh(np.asarray(body.vertices, np.float32), np.asarray(body.faces, np.int32))


def as_body(cleaned: CleanMesh) -> trimesh.Trimesh:
    return trimesh.Trimesh(cleaned.mesh.vertices, cleaned.mesh.faces, process=False)


def bipyramid(num_sides: int, centre: float = 3.0) -> trimesh.Trimesh:
    """A closed body of twice as many faces."""
    angles = 2 * np.pi * np.arange(num_sides) / num_sides
    ring = np.stack([np.cos(angles), np.zeros(num_sides), np.sin(angles)], axis=1)
    here, after = np.arange(num_sides), (np.arange(num_sides) + 1) % num_sides
    top, bottom = np.full(num_sides, num_sides), np.full(num_sides, num_sides + 1)
    faces = np.concatenate([np.stack([here, top, after], 1), np.stack([after, bottom, here], 1)])
    vertices = np.concatenate([ring, [[0, 1, 0], [0, -1, 0]]]) * 0.1 + (centre, 0, 0)
    return trimesh.Trimesh(vertices, faces, process=False)


@cache
def solid_mesh(solid: Solid, num_cells: int = 96) -> Mesh:
    axis = np.linspace(-1.01, 1.01, num_cells + 1, dtype=np.float32)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(1, -1, 3)
    distances = SolidBatch([solid]).signed_distance(torch.from_numpy(points))[0]
    return extract_surface(distances.numpy().reshape((num_cells + 1,) * 3))


def test_a_clean_mesh_stays_as_it_is() -> None:
    ball = trimesh.creation.icosphere()
    cleaned = clean(as_mesh(ball))
    assert (cleaned.report.num_vertices, cleaned.report.num_faces) == (len(ball.vertices), len(ball.faces))
    assert cleaned.report.is_watertight
    assert cleaned.report.num_components == 1
    assert cleaned.report.num_removed_floaters == 0
    assert as_body(cleaned).volume == pytest.approx(ball.volume, rel=1e-5)


def test_repeated_vertices_are_joined() -> None:
    ball = trimesh.creation.icosphere(subdivisions=2)
    soup = trimesh.Trimesh(ball.triangles.reshape(-1, 3), np.arange(3 * len(ball.faces)).reshape(-1, 3), process=False)
    cleaned = clean(as_mesh(soup))
    assert cleaned.report.num_vertices == len(ball.vertices)
    assert cleaned.report.is_watertight


def test_degenerate_and_duplicate_faces_and_folds_go() -> None:
    ball = trimesh.creation.icosphere(subdivisions=2)
    a, b, c = ball.faces[0]
    d = ball.faces[-1][0]
    extra = [
        (a, a, b),  # degenerate
        (b, c, a),  # a duplicate, begun elsewhere
        (a, b, d),  # a fold without thickness,
        (b, a, d),  # of two faces
    ]
    dirty = trimesh.Trimesh(ball.vertices, np.concatenate([ball.faces, extra]), process=False)
    cleaned = clean(as_mesh(dirty))
    assert cleaned.report.num_faces == len(ball.faces)
    assert cleaned.report.is_watertight


@given(st.lists(st.booleans(), min_size=80, max_size=80))
@settings(max_examples=20, deadline=None)
def test_faces_agree_on_what_is_outside_however_they_were_wound(is_turned: list[bool]) -> None:
    ball = trimesh.creation.icosphere(subdivisions=1)
    faces = np.where(np.array(is_turned)[:, None], ball.faces[:, ::-1], ball.faces)
    cleaned = clean(as_mesh(trimesh.Trimesh(ball.vertices, faces, process=False)))
    assert cleaned.report.is_watertight
    assert as_body(cleaned).volume == pytest.approx(ball.volume, rel=1e-5)


def test_floaters_go_and_larger_parts_stay() -> None:
    """The limit as measured of Hunyuan3D's clean-up: beside 5120 faces, 24 go and 25 stay."""
    ball = trimesh.creation.icosphere(subdivisions=4)
    assert len(ball.faces) == 5120
    open_part = bipyramid(13)
    open_part.update_faces(np.arange(26) != 0)
    goes, stays = clean(as_mesh(ball, bipyramid(12))), clean(as_mesh(ball, open_part))
    assert (goes.report.num_faces, goes.report.num_removed_floaters, goes.report.num_components) == (5120, 1, 1)
    assert goes.mesh.vertices[:, 0].max() < 2  # its vertices have gone too
    assert (stays.report.num_faces, stays.report.num_removed_floaters, stays.report.num_components) == (5145, 0, 2)


def test_a_hole_is_reported() -> None:
    ball = trimesh.creation.icosphere(subdivisions=2)
    ball.update_faces(np.arange(len(ball.faces)) != 7)
    assert not clean(as_mesh(ball)).report.is_watertight


def test_a_mesh_below_its_target_is_not_reduced() -> None:
    ball = as_mesh(trimesh.creation.icosphere(subdivisions=3))
    np.testing.assert_array_equal(clean(ball, 1280).mesh.vertices, clean(ball).mesh.vertices)


@pytest.mark.slow
@pytest.mark.parametrize("target_faces", [1000, 5000])
@pytest.mark.parametrize("solid", sample_solids(range(2)) + sample_solids(range(4), held_out=True))
def test_reduction_keeps_the_target_the_volume_and_the_surface_closed(solid: Solid, target_faces: int) -> None:
    mesh = solid_mesh(solid)
    full, reduced = clean(mesh), clean(mesh, target_faces)
    assert full.report.num_faces > 10_000
    assert 0.9 * target_faces < reduced.report.num_faces <= target_faces
    assert reduced.report.is_watertight
    assert as_body(reduced).volume == pytest.approx(as_body(full).volume, rel=0.02)


def test_the_same_mesh_is_cleaned_the_same_way() -> None:
    mesh = solid_mesh(sample_solids([1], held_out=True)[0], num_cells=64)
    first, second = clean(mesh, 800), clean(mesh, 800)
    np.testing.assert_array_equal(first.mesh.vertices, second.mesh.vertices)
    np.testing.assert_array_equal(first.mesh.faces, second.mesh.faces)


def test_a_mesh_of_which_nothing_is_left_is_refused() -> None:
    flat = Mesh(np.eye(3, dtype=np.float32), np.array([[0, 1, 1], [2, 2, 0]], np.int32))
    with pytest.raises(EmptySurface, match="no surface is left of 2 faces"):
        clean(flat)


@pytest.mark.parametrize("solid", sample_solids(range(6), held_out=True))
def test_the_least_target_leaves_a_closed_solid(solid: Solid) -> None:
    reduced = clean(solid_mesh(solid, num_cells=64), MIN_TARGET_FACES)
    assert reduced.report.is_watertight
    assert reduced.report.num_faces < 4 * MIN_TARGET_FACES
    assert as_body(reduced).volume == pytest.approx(as_body(clean(solid_mesh(solid, num_cells=64))).volume, rel=0.25)
