import pytest
import torch
from torch import Tensor

from training.scenes.rendering import render
from training.scenes.scenes import sample_scene
from training.scenes.similarity import psnr, ssim


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return render([sample_scene(seed) for seed in range(4)], 64)


def test_equal_pictures_have_ssim_one_and_infinite_psnr(pictures: Tensor) -> None:
    torch.testing.assert_close(ssim(pictures, pictures), torch.ones(4))
    assert psnr(pictures, pictures).isinf().all()


def test_psnr_is_that_of_the_formula() -> None:
    values = psnr(torch.zeros(2, 3, 8, 8), torch.tensor([0.2, 2.0])[:, None, None, None].expand(2, 3, 8, 8))
    torch.testing.assert_close(values, torch.tensor([20.0, 0.0]), atol=1e-4, rtol=0)


def test_ssim_is_that_of_the_formula_on_flat_pictures() -> None:
    """Without structure only the luminance term is left: (2ab + C1) / (a^2 + b^2 + C1), C1 = (0.01 * 2)^2."""
    flat = torch.tensor([0.5, 0.25])[:, None, None, None, None].expand(2, 1, 3, 16, 16)
    expected = (2 * 0.5 * 0.25 + 4e-4) / (0.5**2 + 0.25**2 + 4e-4)
    assert float(ssim(flat[0], flat[1])) == pytest.approx(expected, abs=1e-6)


def test_each_pair_has_its_own_value(pictures: Tensor) -> None:
    noise = 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    noisy = pictures + noise * torch.tensor([0.0, 0.5, 1.0, 2.0])[:, None, None, None]
    for measure in (psnr, ssim):
        values = measure(pictures, noisy)
        assert values.shape == (4,)
        alone = torch.cat([measure(pictures[i : i + 1], noisy[i : i + 1]) for i in range(4)])
        assert torch.equal(values, alone)
    assert psnr(pictures, noisy).diff().lt(0).all()
    assert ssim(pictures, noisy)[0] == pytest.approx(1.0)


def test_pictures_of_unlike_shapes_are_refused(pictures: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(4, 3, 64, 64\) and \(4, 3, 32, 32\)"):
        psnr(pictures, pictures[:, :, :32, :32])
    with pytest.raises(ValueError, match="batch, 3, height, width"):
        ssim(pictures[0], pictures[0])
