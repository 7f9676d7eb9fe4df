import pytest
import torch
from torch import Tensor

from training.scenes.rendering import render
from training.scenes.scenes import sample_scene
from training.scenes.similarity import psnr


@pytest.fixture(scope="module")
def images() -> Tensor:
    return render([sample_scene(seed) for seed in range(4)], 64)


def test_equal_images_have_infinite_psnr(images: Tensor) -> None:
    assert psnr(images, images).isinf().all()


def test_psnr_follows_its_formula() -> None:
    values = psnr(torch.zeros(2, 3, 8, 8), torch.tensor([0.2, 2.0])[:, None, None, None].expand(2, 3, 8, 8))
    torch.testing.assert_close(values, torch.tensor([20.0, 0.0]), atol=1e-4, rtol=0)


def test_each_pair_has_its_own_value(images: Tensor) -> None:
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = images + noise * torch.tensor([0.0, 0.5, 1.0, 2.0])[:, None, None, None]
    values = psnr(images, noisy)
    assert values.shape == (4,)
    alone = torch.cat([psnr(images[i : i + 1], noisy[i : i + 1]) for i in range(4)])
    assert torch.equal(values, alone)
    assert values.diff().lt(0).all()


def test_images_of_unequal_or_wrong_shapes_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(4, 3, 64, 64\) and \(4, 3, 32, 32\)"):
        psnr(images, images[:, :, :32, :32])
    with pytest.raises(ValueError, match="batch, 3, height, width"):
        psnr(images[0], images[0])
