from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from training.solids.primitives import PRIMITIVES
from training.solids.sampling import sample_solids
from training.solids.solids import KINDS, Matrix, Part, Solid, SolidBatch, Vector

UPRIGHT: Matrix = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
LYING: Matrix = ((0.0, 1.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 0.0, 1.0))  # its y axis points along +x
ORIGIN: Vector = (0.0, 0.0, 0.0)
SIZES: dict[str, Vector] = {
    "sphere": (0.7, 0.0, 0.0),
    "box": (0.6, 0.4, 0.3),
    "cylinder": (0.5, 0.7, 0.0),
    "cone": (0.6, 0.8, 0.0),
    "torus": (0.6, 0.25, 0.0),
    "capsule": (0.3, 0.5, 0.0),
}
VOLUMES = {
    "sphere": 4 / 3 * np.pi * 0.7**3,
    "box": 8 * 0.6 * 0.4 * 0.3,
    "cylinder": np.pi * 0.5**2 * 1.4,
    "cone": np.pi * 0.6**2 * 1.6 / 3,
    "torus": 2 * np.pi**2 * 0.6 * 0.25**2,
    "capsule": np.pi * 0.3**2 * (1.0 + 4 / 3 * 0.3),
}


def primitive(kind: str, rotation: Matrix = UPRIGHT, centre: Vector = ORIGIN) -> Solid:
    return Solid((Part(kind, SIZES[kind], rotation, centre),), None)


def distances(solid: Solid, points: Tensor | Sequence[Vector]) -> Tensor:
    return SolidBatch([solid]).signed_distance(torch.as_tensor(points, dtype=torch.float32)[None])[0]


def random_points(count: int) -> Tensor:
    return 2.4 * torch.rand(count, 3, generator=torch.Generator().manual_seed(0)) - 1.2


def surface(solid: Solid, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    points, normals = SolidBatch([solid]).surface_points(count, torch.Generator().manual_seed(seed))
    return points[0], normals[0]


MIXED = [*sample_solids(range(20)), *sample_solids(range(20), held_out=True)]


@pytest.mark.parametrize(
    ("kind", "point", "expected"),
    [
        ("sphere", (0, 0, 0), 0.7),
        ("sphere", (0, 0, 1), -0.3),
        ("box", (0, 0, 0), 0.3),
        ("box", (0.9, 0.8, 0), -0.5),
        ("box", (0.5, 0, 0), 0.1),
        ("cylinder", (0, 0.6, 0), 0.1),
        ("cylinder", (0.8, 1.1, 0), -0.5),
        ("cylinder", (0, 0, -0.9), -0.4),
        ("cone", (0, 1.0, 0), -0.2),
        ("cone", (0, -0.9, 0), -0.1),
        ("cone", (0.9, -1.2, 0), -0.5),
        ("cone", (0, -0.7, 0), 0.1),
        ("torus", (0, 0, 0), -0.35),
        ("torus", (0, 0, 0.6), 0.25),
        ("torus", (0.6, 0.5, 0), -0.25),
        ("capsule", (0, 0.9, 0), -0.1),
        ("capsule", (0.5, 0.2, 0), -0.2),
        ("capsule", (0, 0.4, 0), 0.3),
    ],
)
def test_distances_of_primitives_are_exact(kind: str, point: tuple[float, float, float], expected: float) -> None:
    assert distances(primitive(kind), [point]).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_distance_of_a_primitive_is_the_distance_to_its_nearest_surface_point(kind: str) -> None:
    """Compared with 100,000 points of the surface, which other formulas give."""
    solid, points = primitive(kind), random_points(1000)
    nearest, _ = cKDTree(surface(solid, 100_000)[0].numpy()).query(points.numpy())
    np.testing.assert_allclose(distances(solid, points).abs(), nearest, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_inside_of_a_primitive_has_its_volume(kind: str) -> None:
    share = (distances(primitive(kind), random_points(400_000)) > 0).float().mean().item()
    assert share * 2.4**3 == pytest.approx(VOLUMES[kind], rel=0.02)


def test_parts_are_rotated_then_moved() -> None:
    tall = primitive("capsule", LYING, (0.1, 0.2, 0.3))
    assert distances(tall, [(0.1 + 0.7, 0.2, 0.3)]).item() == pytest.approx(0.1, abs=1e-6)
    assert distances(tall, [(0.1, 0.2 + 0.7, 0.3)]).item() == pytest.approx(-0.4, abs=1e-6)


def test_union_joins_both_parts_and_cut_removes_the_second_from_the_first() -> None:
    parts = (Part("sphere", SIZES["sphere"], UPRIGHT, ORIGIN), Part("box", SIZES["box"], UPRIGHT, (0.5, 0.0, 0.0)))
    points = random_points(20_000)
    first, second = (distances(Solid((part,), None), points) > 0 for part in parts)
    assert torch.equal(distances(Solid(parts, "union"), points) > 0, first | second)
    assert torch.equal(distances(Solid(parts, "cut"), points) > 0, first & ~second)


@pytest.mark.parametrize("solid", MIXED[::3])
def test_distances_never_exceed_the_true_ones(solid: Solid) -> None:
    """Sphere tracing relies on this bound. For a primitive the distances are exact."""
    points = random_points(2000)
    nearest, _ = cKDTree(surface(solid, 40_000)[0].numpy()).query(points.numpy())
    found = distances(solid, points).abs().numpy()
    assert (found <= nearest + 1e-4).all()
    if solid.operation is None:
        np.testing.assert_allclose(found, nearest, atol=0.03)


def test_solids_evaluated_together_give_the_distances_of_each_alone() -> None:
    points = random_points(500)
    together = SolidBatch(MIXED).signed_distance(points.expand(len(MIXED), -1, -1))
    for solid, found in zip(MIXED, together, strict=True):
        torch.testing.assert_close(found, distances(solid, points), atol=1e-6, rtol=0)


@pytest.mark.parametrize("solid", MIXED[::2])
def test_surface_points_lie_on_the_surface_and_their_normals_point_out(solid: Solid) -> None:
    points, normals = surface(solid, 2000)
    assert distances(solid, points).abs().max() < 1e-4
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(2000), atol=1e-4, rtol=0)
    is_out, is_in = distances(solid, points + 1e-3 * normals) < 0, distances(solid, points - 1e-3 * normals) > 0
    # Points within a thousandth of an edge may differ.
    assert is_out.float().mean() > 0.99
    assert is_in.float().mean() > 0.99


@pytest.mark.parametrize("kind", KINDS)
def test_surface_points_are_uniform_by_area(kind: str) -> None:
    """By the divergence theorem the mean of `point . normal` over the surface is three times volume over area."""
    points, normals = surface(primitive(kind), 200_000)
    area = PRIMITIVES[kind].area(*torch.tensor(SIZES[kind])).item()
    assert (points * normals).sum(1).mean().item() * area / 3 == pytest.approx(VOLUMES[kind], rel=0.01)
    # Moments along the axis show whether some regions of the surface are drawn more often than others.
    shift = torch.tensor((0.0, 1.0, 0.0))
    flux = ((points + shift) * normals).sum(1).mean().item() * area / 3
    assert flux == pytest.approx(VOLUMES[kind], rel=0.02)


def test_covered_part_gets_no_surface_points() -> None:
    inside = Part("sphere", (0.2, 0.0, 0.0), UPRIGHT, ORIGIN)
    points, _ = surface(Solid((Part("sphere", SIZES["sphere"], UPRIGHT, ORIGIN), inside), "union"), 3000)
    torch.testing.assert_close(points.norm(dim=1), torch.full((3000,), 0.7))


def test_surface_of_a_cut_has_the_groove_with_normals_into_it() -> None:
    ball = Part("sphere", SIZES["sphere"], UPRIGHT, ORIGIN)
    hole = Part("sphere", (0.4, 0.0, 0.0), UPRIGHT, ORIGIN)
    points, normals = surface(Solid((ball, hole), "cut"), 20_000)
    is_of_hole = points.norm(dim=1) < 0.5
    assert is_of_hole.float().mean().item() == pytest.approx(0.4**2 / (0.4**2 + 0.7**2), abs=0.02)
    assert ((points * normals).sum(1)[is_of_hole] < 0).all()


@pytest.mark.parametrize("solid", MIXED)
def test_bounds_hold_the_solid(solid: Solid) -> None:
    lower, upper = SolidBatch([solid]).bounds()
    points, _ = surface(solid, 4000)
    assert (points >= lower - 1e-4).all()
    assert (points <= upper + 1e-4).all()
    if solid.operation != "cut":
        assert (points.amin(0) - lower).max() < 0.05
        assert (upper - points.amax(0)).max() < 0.05
