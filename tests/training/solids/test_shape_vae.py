from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.families.hunyuan3d.shape_vae import ShapeVAE
from models.mesh.surface import BOUNDS
from training.solids import shape_vae
from training.solids.sampling import sample_solids
from training.solids.shape_vae import NUM_DATA_POINTS, NUM_LATENTS, build_shape_vae, encode, field_iou, spread_out
from training.solids.solids import Solid, SolidBatch
from training.solids.surfaces import PointPool


@pytest.fixture(scope="module")
def solids() -> list[Solid]:
    return sample_solids(range(6))


@pytest.fixture
def vae() -> ShapeVAE:
    return build_shape_vae().requires_grad_(False)


@pytest.fixture
def surface(solids: list[Solid]) -> Tensor:
    points = SolidBatch(solids).surface_points(NUM_DATA_POINTS, torch.Generator().manual_seed(0))
    return torch.cat(points, dim=-1)


def test_spread_out_points_cover_the_others() -> None:
    points = torch.rand(3, 400, 3, generator=torch.Generator().manual_seed(0))
    chosen = points.gather(1, spread_out(points, 40)[..., None].expand(-1, -1, 3))
    at_random = points[:, :40]
    assert torch.cdist(points, chosen).amin(2).amax() < 0.7 * torch.cdist(points, at_random).amin(2).amax()
    assert torch.cdist(chosen, chosen).flatten(1).sort().values[:, 40].min() > 0.1


def test_new_latents_hold_the_positions_and_normals_of_their_points(vae: ShapeVAE, surface: Tensor) -> None:
    latents = encode(vae, surface)
    assert latents.shape == (6, NUM_LATENTS, shape_vae.LATENT_CHANNELS)
    chosen = surface.gather(1, spread_out(surface[..., :3], NUM_LATENTS)[..., None].expand(-1, -1, 6))
    fit = torch.linalg.lstsq(torch.nn.functional.pad(latents.flatten(0, 1), (0, 1), value=1.0), chosen.flatten(0, 1))
    predicted = torch.nn.functional.pad(latents.flatten(0, 1), (0, 1), value=1.0) @ fit.solution
    assert (predicted - chosen.flatten(0, 1)).square().mean() < 0.1 * chosen.var()


def test_field_of_a_new_decoder_depends_on_the_latents_near_a_point(vae: ShapeVAE, surface: Tensor) -> None:
    """A decoder without this property first has to learn which latent is where."""
    latents = encode(vae, surface)[:1]
    positions = surface.gather(1, spread_out(surface[..., :3], NUM_LATENTS)[..., None].expand(-1, -1, 6))[0, :, :3]
    before = vae.field(latents)(positions[None])
    moved = latents.clone()
    moved[0, 0] += 1
    change = (vae.field(moved)(positions[None]) - before).abs()[0]
    near = (positions - positions[0]).norm(dim=1).argsort()
    assert change[near[:8]].mean() > 3 * change[near[-24:]].mean()


def test_standardised_latents_have_zero_mean_and_unit_variance_and_decode_as_before(
    vae: ShapeVAE, surface: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.solids.surfaces.CHUNK", 64)
    points = 2 * torch.rand(6, 50, 3, generator=torch.Generator().manual_seed(1)) - 1
    expected = vae.field(encode(vae, surface))(points)
    pool = PointPool(tmp_path, 128)
    shape_vae._standardise(vae, pool)
    latents = encode(vae, pool.surface_points(torch.arange(128), NUM_DATA_POINTS, torch.Generator().manual_seed(5)))
    torch.testing.assert_close(latents.mean((0, 1)), torch.zeros(16), rtol=0, atol=0.05)
    torch.testing.assert_close(latents.std((0, 1)), torch.ones(16), rtol=0, atol=0.05)
    torch.testing.assert_close(vae.field(encode(vae, surface))(points), expected, rtol=1e-3, atol=1e-3)


def test_iou_of_the_true_field_is_one_and_of_a_wrong_one_is_less(solids: list[Solid]) -> None:
    batch = SolidBatch(solids)
    assert field_iou(batch.signed_distance, batch, torch.Generator().manual_seed(0)).eq(1).all()
    larger = field_iou(lambda points: batch.signed_distance(points) + 0.1, batch, torch.Generator().manual_seed(0))
    assert larger.lt(0.9).all()


def test_pool_has_the_true_logits_and_normals_of_the_solids(
    solids: list[Solid], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.solids.surfaces.CHUNK", 64)
    pool, rng, batch = PointPool(tmp_path, 64), torch.Generator().manual_seed(0), SolidBatch(solids)
    surface = pool.surface_points(torch.arange(6), 200, rng)
    on_surface, normals = surface.split(3, dim=-1)
    assert batch.signed_distance(on_surface).abs().max() < 2e-3
    assert (batch.signed_distance(on_surface + 0.02 * normals) < 0).float().mean() > 0.97
    points, logits = pool.field_samples(torch.arange(6), 200, rng)
    torch.testing.assert_close(logits, (batch.signed_distance(points) / 0.1).clamp(-1, 1), rtol=0, atol=2e-3)
    assert points.abs().max() <= BOUNDS + 1e-3
    assert torch.equal(
        PointPool(tmp_path, 64).surface_points(torch.arange(6), 9, torch.Generator().manual_seed(1)),
        pool.surface_points(torch.arange(6), 9, torch.Generator().manual_seed(1)),
    )
