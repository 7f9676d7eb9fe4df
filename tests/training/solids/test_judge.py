import math

import numpy as np
import pytest
import torch
import trimesh
from trimesh.parent import Geometry

from models.mesh.surface import Mesh, extract_surface
from models.mesh.volume import decode_dense
from training.solids.judge import occupancy, surface_likeness, surface_samples, volume_iou
from training.solids.sampling import sample_solids
from training.solids.solids import Part, Solid, SolidBatch

UPRIGHT = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
BALL = Solid((Part("sphere", (0.8, 0.0, 0.0), UPRIGHT, (0.0, 0.0, 0.0)),), None)


def as_mesh(body: Geometry) -> Mesh:
    assert isinstance(body, trimesh.Trimesh)
    return Mesh(body.vertices.astype(np.float32), body.faces.astype(np.int32))


def box(extents: tuple[float, float, float], centre: tuple[float, float, float] = (0, 0, 0)) -> Mesh:
    return as_mesh(trimesh.creation.box(extents, trimesh.transformations.translation_matrix(centre)))


def ball(radius: float, centre: tuple[float, float, float] = (0, 0, 0)) -> Mesh:
    body = trimesh.creation.icosphere(subdivisions=5, radius=radius)
    return as_mesh(body.apply_translation(centre))


def meshed(solid: Solid) -> Mesh:
    batch = SolidBatch([solid])
    grid = decode_dense(
        lambda p: batch.signed_distance(p[None])[0], 96, points_per_call=2**17, device=torch.device("cpu")
    )
    return extract_surface(grid.numpy())


def test_shape_is_identical_to_itself() -> None:
    likeness = surface_likeness(BALL, BALL)
    assert volume_iou(BALL, BALL) == 1
    assert likeness.f_score > 0.999
    assert likeness.chamfer < 0.008


def test_mesh_of_a_ball_has_the_occupancy_of_the_ball() -> None:
    assert (occupancy(ball(0.8)) == occupancy(BALL)).mean() > 0.9995


@pytest.mark.parametrize(("axis", "shift"), [(0, 0.5), (1, -0.3), (2, 0.4)])
def test_iou_of_shifted_boxes_follows_from_their_sides(axis: int, shift: float) -> None:
    x, y, z = (shift if i == axis else 0.0 for i in range(3))
    shared = 1 - abs(shift)
    iou = volume_iou(box((1, 1, 1)), box((1, 1, 1), (x, y, z)))
    assert iou == pytest.approx(shared / (2 - shared), abs=0.015)


def test_iou_of_concentric_balls_is_the_ratio_of_their_volumes() -> None:
    assert volume_iou(ball(0.6), BALL) == pytest.approx((0.6 / 0.8) ** 3, abs=0.005)


def test_separate_shapes_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.solids.judge.NUM_SAMPLES", 5000)  # far neighbours are slow to find
    left, right = ball(0.2, (-0.6, 0, 0)), ball(0.2, (0.6, 0, 0))
    assert volume_iou(left, right) == 0
    assert surface_likeness(left, right).f_score == 0


def test_hollow_is_not_inside() -> None:
    outer, inner = trimesh.creation.icosphere(radius=0.8), trimesh.creation.icosphere(radius=0.4)
    inner.invert()
    shell = as_mesh(trimesh.util.concatenate([outer, inner]))
    assert volume_iou(shell, ball(0.8)) == pytest.approx(1 - 0.5**3, abs=0.03)


def test_overlapping_parts_of_a_mesh_are_joined() -> None:
    pair = trimesh.util.concatenate(
        [trimesh.creation.box((1, 1, 1)), trimesh.creation.box((1, 1, 1)).apply_translation((0.5, 0, 0))]
    )
    assert volume_iou(as_mesh(pair), box((1.5, 1, 1), (0.25, 0, 0))) > 0.999


def test_volume_is_exact_for_flat_sides_of_large_triangles() -> None:
    turned = trimesh.creation.box((1.0, 0.7, 0.5)).apply_transform(
        trimesh.transformations.rotation_matrix(0.7, (1, 2, 3))
    )
    cell = 2.02 / len(occupancy(BALL))
    assert occupancy(as_mesh(turned)).sum() * cell**3 == pytest.approx(0.35, rel=0.005)


@pytest.mark.parametrize("solid", sample_solids(range(4)) + sample_solids(range(4), held_out=True))
def test_mesh_of_a_solid_agrees_with_the_solid(solid: Solid) -> None:
    mesh = meshed(solid)
    assert volume_iou(mesh, solid) > 0.98
    assert surface_likeness(mesh, solid).f_score > 0.995


def test_chamfer_of_concentric_balls_is_the_gap_between_them() -> None:
    likeness = surface_likeness(ball(0.7), BALL)
    assert likeness.chamfer == pytest.approx(0.1, abs=2e-3)
    assert likeness.f_score == 0


def test_f_score_follows_the_share_of_the_surface_that_is_near() -> None:
    """Two boxes differ by a lid moved out by 0.2; their sides and floors agree."""
    low, high = box((1, 1, 1)), box((1, 1.2, 1), (0, 0.1, 0))
    precision = (4 + 1 + 4 * 0.02) / 6  # of the lid, only the samples at its rim are near
    recall = (1 + 4 * 1.02) / (1 + 4 * 1.2 + 1)
    expected = 2 * precision * recall / (precision + recall)
    assert surface_likeness(low, high).f_score == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("shape", [BALL, ball(0.8)])
def test_samples_are_uniform_on_the_surface_and_reproducible(shape: Solid | Mesh) -> None:
    samples = surface_samples(shape, seed=3)
    np.testing.assert_allclose(np.linalg.norm(samples, axis=1), 0.8, atol=1e-3)
    octants = np.bincount((samples > 0) @ (4, 2, 1), minlength=8) / len(samples)
    np.testing.assert_allclose(octants, 1 / 8, atol=5 * math.sqrt(1 / 8 / len(samples)))
    np.testing.assert_array_equal(samples, surface_samples(shape, seed=3))
