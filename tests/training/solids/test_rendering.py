import math

import pytest
import torch
from torch import Tensor

from training.solids.rendering import CAMERA_DISTANCE, FIELD_OF_VIEW, render
from training.solids.sampling import sample_solids
from training.solids.solids import Part, Solid, SolidBatch

UPRIGHT = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
SOLIDS = sample_solids(range(6)) + sample_solids(range(6), held_out=True)


def ball(radius: float, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Solid:
    return Solid((Part("sphere", (radius, 0.0, 0.0), UPRIGHT, centre),), None)


def alpha(solid: Solid, size: int = 112) -> Tensor:
    return render([solid], [0], size)[0, :, :, 3].float() / 255


def projected(points: Tensor, size: int) -> Tensor:
    """Pixel coordinates (row, column) of points `(points, 3)`."""
    scale = size / 2 / math.tan(FIELD_OF_VIEW / 2) / (CAMERA_DISTANCE - points[:, 2])
    return torch.stack((size / 2 - points[:, 1] * scale, size / 2 + points[:, 0] * scale), 1)


def test_images_are_rgba_with_white_and_no_alpha_around_the_solid() -> None:
    image = render([ball(0.5)], [0], 64)
    assert image.shape == (1, 64, 64, 4)
    assert image.dtype == torch.uint8
    assert image[0, 0, 0].tolist() == [255, 255, 255, 0]
    assert image[0, 32, 32, 3] == 255


@pytest.mark.parametrize("radius", [0.3, 0.9])
def test_ball_covers_the_disc_of_its_perspective_projection(radius: float) -> None:
    half_angle = math.asin(radius / CAMERA_DISTANCE)
    disc = math.pi * (math.tan(half_angle) / math.tan(FIELD_OF_VIEW / 2)) ** 2 / 4
    assert alpha(ball(radius)).mean().item() == pytest.approx(disc, rel=0.01)


def test_axes_point_right_and_up_and_nearer_solids_are_larger() -> None:
    covered = alpha(ball(0.2, (0.5, 0.6, 0.0)))
    rows, columns = covered.nonzero().float().mean(0)
    expected = projected(torch.tensor([(0.5, 0.6, 0.0)]), 112)[0]
    assert rows.item() == pytest.approx(expected[0].item() - 0.5, abs=0.5)
    assert columns.item() == pytest.approx(expected[1].item() - 0.5, abs=0.5)
    assert alpha(ball(0.2, (0, 0, 0.6))).sum() > 1.2 * alpha(ball(0.2, (0, 0, -0.6))).sum()


@pytest.mark.parametrize("solid", SOLIDS)
def test_outline_is_the_projection_of_the_surface(solid: Solid) -> None:
    """Surface points project onto all covered pixels, and onto no others except at the edge."""
    points, _ = SolidBatch([solid]).surface_points(60_000, torch.Generator().manual_seed(0))
    rows, columns = projected(points[0], 112).long().T
    is_hit = torch.zeros(112, 112, dtype=torch.bool)
    is_hit[rows, columns] = True
    covered = alpha(solid)
    near_covered = torch.nn.functional.max_pool2d(covered[None], 3, stride=1, padding=1)[0] > 0
    assert (is_hit & ~near_covered).sum() <= 2
    assert (is_hit & (covered == 0)).sum() < 0.02 * is_hit.sum()
    assert (~is_hit & (covered > 0.99)).sum() < 0.01 * is_hit.sum()


@pytest.mark.parametrize("solid", SOLIDS[::3])
def test_solid_fits_into_its_image(solid: Solid) -> None:
    covered = alpha(solid)
    assert covered[[0, -1]].max() == 0
    assert covered[:, [0, -1]].max() == 0


def test_look_seed_determines_the_look() -> None:
    first, again, other = render([ball(0.6)] * 3, [7, 7, 8])
    assert torch.equal(first, again)
    assert (first.float() - other.float()).abs().mean() > 5
    assert torch.equal(first[..., 3], other[..., 3])


def test_image_of_a_solid_does_not_depend_on_its_batch() -> None:
    together = render(SOLIDS[:4], range(4), 64)
    for number, solid in enumerate(SOLIDS[:4]):
        assert torch.equal(render([solid], [number], 64)[0], together[number])


def test_shading_shows_form() -> None:
    """A ball's brightness varies, and no visible point is black."""
    for seed in range(8):
        image = render([ball(0.8)], [seed], 64)[0].float()
        seen = image[..., :3].mean(-1)[image[..., 3] == 255]
        assert seen.max() > 1.4 * seen.min()
        assert seen.min() > 5


def test_edges_are_smooth_in_alpha_and_keep_the_colours_of_the_solid() -> None:
    image = render([ball(0.8)], [1], 64)[0].float()
    is_edge = (image[..., 3] > 0) & (image[..., 3] < 255)
    assert is_edge.sum() > 40
    inner = image[..., :3][image[..., 3] == 255]
    assert image[..., :3][is_edge].max() <= inner.max() + 1
