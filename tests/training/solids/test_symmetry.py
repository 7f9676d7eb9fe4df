import pytest
import torch

from training.solids.sampling import sample_solids
from training.solids.solids import SolidBatch
from training.solids.symmetry import NUM_SYMMETRIES, turn_images, turn_points


def silhouette(points: torch.Tensor, batch: SolidBatch, side: int) -> torch.Tensor:
    """Whether any point behind each pixel is inside, `(batch, side, side)`."""
    inside = batch.signed_distance(points) > 0
    any_inside: torch.Tensor = inside.unflatten(1, (side, side, -1)).any(-1)
    return any_inside


@pytest.mark.parametrize("symmetry", range(NUM_SYMMETRIES))
def test_turned_image_shows_the_turned_solid(symmetry: int) -> None:
    """Shown by parallel projections of the inside, on axes as in images: rows point down, columns right."""
    # Given a grid of points behind pixels, and the silhouette they show
    side, batch = 24, SolidBatch(sample_solids([3, 4]))
    middles = (torch.arange(side) + 0.5) * (2 / side) - 1
    y, x, z = torch.meshgrid(-middles, middles, middles, indexing="ij")
    points = torch.stack((x, y, z), -1).flatten(0, 2).expand(2, -1, 3)
    image = silhouette(points, batch, side)[:, None].float().expand(-1, 3, -1, -1)
    # When both are turned
    symmetries = torch.tensor([symmetry, symmetry])
    turned, positions = turn_images(image, symmetries), turn_points(points, symmetries)
    # Then the silhouette at the turned positions is the turned image
    inside = (batch.signed_distance(points) > 0).float()
    column = ((positions[..., 0] + 1) / 2 * side).long()
    row = ((1 - positions[..., 1]) / 2 * side).long()
    seen = torch.zeros(2, side * side).scatter_reduce(1, row * side + column, inside, "amax")
    assert torch.equal(seen.view(2, side, side), turned[:, 0])
