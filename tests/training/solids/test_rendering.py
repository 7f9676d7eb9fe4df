import math

import pytest
import torch
from torch import Tensor

from training.solids.rendering import CAMERA_DISTANCE, FIELD_OF_VIEW, render
from training.solids.solids import Part, Solid, SolidBatch, sample_solids

UPRIGHT = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
SOLIDS = sample_solids(range(6)) + sample_solids(range(6), held_out=True)


def ball(radius: float, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Solid:
    return Solid((Part("sphere", (radius, 0.0, 0.0), UPRIGHT, centre),), None)


def alpha(solid: Solid, size: int = 112) -> Tensor:
    return render([solid], [0], size)[0, :, :, 3].float() / 255


def projected(points: Tensor, size: int) -> Tensor:
    """Pixel coordinates, row and column, of places `(points, 3)`."""
    scale = size / 2 / math.tan(FIELD_OF_VIEW / 2) / (CAMERA_DISTANCE - points[:, 2])
    return torch.stack((size / 2 - points[:, 1] * scale, size / 2 + points[:, 0] * scale), 1)


def test_pictures_are_rgba_with_white_and_no_alpha_around_the_solid() -> None:
    picture = render([ball(0.5)], [0], 64)
    assert picture.shape == (1, 64, 64, 4)
    assert picture.dtype == torch.uint8
    assert picture[0, 0, 0].tolist() == [255, 255, 255, 0]
    assert picture[0, 32, 32, 3] == 255


@pytest.mark.parametrize("radius", [0.3, 0.9])
def test_a_ball_covers_the_disc_that_perspective_tells(radius: float) -> None:
    half_angle = math.asin(radius / CAMERA_DISTANCE)
    disc = math.pi * (math.tan(half_angle) / math.tan(FIELD_OF_VIEW / 2)) ** 2 / 4
    assert alpha(ball(radius)).mean().item() == pytest.approx(disc, rel=0.01)


def test_right_is_right_up_is_up_and_nearer_is_larger() -> None:
    covered = alpha(ball(0.2, (0.5, 0.6, 0.0)))
    rows, columns = covered.nonzero().float().mean(0)
    expected = projected(torch.tensor([(0.5, 0.6, 0.0)]), 112)[0]
    assert rows.item() == pytest.approx(expected[0].item() - 0.5, abs=0.5)
    assert columns.item() == pytest.approx(expected[1].item() - 0.5, abs=0.5)
    assert alpha(ball(0.2, (0, 0, 0.6))).sum() > 1.2 * alpha(ball(0.2, (0, 0, -0.6))).sum()


@pytest.mark.parametrize("solid", SOLIDS)
def test_the_outline_is_that_of_the_solids_surface(solid: Solid) -> None:
    """Many points of the surface fall on all covered pixels, and on no others but those that its edge just touches."""
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
def test_a_solid_fits_into_its_picture(solid: Solid) -> None:
    covered = alpha(solid)
    assert covered[[0, -1]].max() == 0
    assert covered[:, [0, -1]].max() == 0


def test_a_look_is_the_same_again_and_another_seed_has_another() -> None:
    first, again, other = render([ball(0.6)] * 3, [7, 7, 8])
    assert torch.equal(first, again)
    assert (first.float() - other.float()).abs().mean() > 5
    assert torch.equal(first[..., 3], other[..., 3])


def test_a_solids_picture_does_not_depend_on_those_drawn_with_it() -> None:
    together = render(SOLIDS[:4], range(4), 64)
    for number, solid in enumerate(SOLIDS[:4]):
        assert torch.equal(render([solid], [number], 64)[0], together[number])


def test_shading_tells_of_form() -> None:
    """A ball's brightness varies over it, and is never black where it is seen."""
    for seed in range(8):
        picture = render([ball(0.8)], [seed], 64)[0].float()
        seen = picture[..., :3].mean(-1)[picture[..., 3] == 255]
        assert seen.max() > 1.4 * seen.min()
        assert seen.min() > 5


def test_edges_are_smoothed_in_alpha_while_colours_stay_those_of_the_solid() -> None:
    picture = render([ball(0.8)], [1], 64)[0].float()
    is_edge = (picture[..., 3] > 0) & (picture[..., 3] < 255)
    assert is_edge.sum() > 40
    inner = picture[..., :3][picture[..., 3] == 255]
    assert picture[..., :3][is_edge].max() <= inner.max() + 1
