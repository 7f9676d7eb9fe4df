import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from training.scenes.rendering import render
from training.scenes.scenes import sample_scene
from training.scenes.vae import PictureVae, flux_vae, qwen_image_vae, reconstruction_psnr, wrap_qwen_image_vae


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return render([sample_scene(seed) for seed in range(4)], 64)


@pytest.fixture(params=[flux_vae, qwen_image_vae], ids=["flux", "qwen_image"])
def vae(request: pytest.FixtureRequest) -> PictureVae:
    result: PictureVae = request.param()
    result.module.requires_grad_(False)
    return result


def test_untrained_autoencoder_carries_colour(vae: PictureVae, pictures: Tensor) -> None:
    assert reconstruction_psnr(vae, pictures) > 20


def test_latents_are_eight_times_smaller(vae: PictureVae, pictures: Tensor) -> None:
    latents = vae.encode(pictures[:1])
    assert latents.shape == (1, 8, 8, 8)
    assert vae.decode(latents).shape == (1, 3, 64, 64)


def test_standardised_latents_have_zero_mean_and_unit_variance_and_mean_the_same(
    vae: PictureVae, pictures: Tensor
) -> None:
    before = vae.encode(pictures)
    expected = vae.decode(before)
    vae.standardise(before)
    latents = vae.encode(pictures)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(vae.decode(latents), expected, rtol=0, atol=1e-4)


def test_qwen_image_latents_are_standardised_by_the_configuration_alone(pictures: Tensor) -> None:
    vae = qwen_image_vae()
    vae.module.requires_grad_(False)
    module = vae.module
    assert isinstance(module, AutoencoderKLQwenImage)
    latents = vae.encode(pictures)
    decoder = {name: tensor.clone() for name, tensor in module.decoder.state_dict().items()}
    vae.standardise(latents)
    assert module.config.latents_mean == pytest.approx(latents.mean((0, 2, 3)).tolist())
    assert module.config.latents_std == pytest.approx(latents.std((0, 2, 3)).tolist())
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in module.decoder.state_dict().items())


@torch.no_grad()
def test_single_frame_shortcut_equals_the_original_forward(pictures: Tensor) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False] * 3,
        latents_mean=[0.1 * i for i in range(8)],
        latents_std=[0.5 + 0.1 * i for i in range(8)],
    )
    shape = (1, 8, 1, 1)
    mean, std = torch.tensor(vae.config.latents_mean).view(shape), torch.tensor(vae.config.latents_std).view(shape)
    latents = (vae.encode(pictures[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    decoded = vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    wrapped = wrap_qwen_image_vae(vae)
    torch.testing.assert_close(wrapped.encode(pictures), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wrapped.decode(latents).clamp(-1, 1), decoded, rtol=1e-4, atol=1e-4)


def test_what_is_decoded_in_training_is_not_clamped(pictures: Tensor) -> None:
    """A clamped pixel has no gradient."""
    vae = qwen_image_vae()
    vae.module.requires_grad_(False)
    assert vae.decode(4 * vae.encode(pictures[:1])).abs().max() > 1.01
