import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from training.scenes.rendering import render
from training.scenes.scenes import sample_scene
from training.scenes.vae import ImageVae, flux_vae, qwen_image_vae, reconstruction_psnr, wrap_qwen_image_vae


@pytest.fixture(scope="module")
def images() -> Tensor:
    return render([sample_scene(seed) for seed in range(4)], 64)


@pytest.fixture(params=[flux_vae, qwen_image_vae], ids=["flux", "qwen_image"])
def vae(request: pytest.FixtureRequest) -> ImageVae:
    result: ImageVae = request.param()
    result.module.requires_grad_(False)
    return result


def test_untrained_autoencoder_carries_colour(vae: ImageVae, images: Tensor) -> None:
    assert reconstruction_psnr(vae, images) > 20


def test_latents_are_eight_times_smaller(vae: ImageVae, images: Tensor) -> None:
    latents = vae.encode(images[:1])
    assert latents.shape == (1, 8, 8, 8)
    assert vae.decode(latents).shape == (1, 3, 64, 64)


def test_standardised_latents_are_normalised_and_decode_as_before(vae: ImageVae, images: Tensor) -> None:
    before = vae.encode(images)
    expected = vae.decode(before)
    vae.standardise(before)
    latents = vae.encode(images)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(8), rtol=0, atol=1e-4)
    torch.testing.assert_close(vae.decode(latents), expected, rtol=0, atol=1e-4)


def test_qwen_image_latents_are_standardised_by_the_configuration_alone(images: Tensor) -> None:
    vae = qwen_image_vae()
    vae.module.requires_grad_(False)
    module = vae.module
    assert isinstance(module, AutoencoderKLQwenImage)
    latents = vae.encode(images)
    decoder = {name: tensor.clone() for name, tensor in module.decoder.state_dict().items()}
    vae.standardise(latents)
    assert module.config.latents_mean == pytest.approx(latents.mean((0, 2, 3)).tolist())
    assert module.config.latents_std == pytest.approx(latents.std((0, 2, 3)).tolist())
    assert all(torch.equal(tensor, decoder[name]) for name, tensor in module.decoder.state_dict().items())


@torch.no_grad()
def test_single_frame_shortcut_equals_the_original_forward(images: Tensor) -> None:
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
    latents = (vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    decoded = vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    wrapped = wrap_qwen_image_vae(vae)
    torch.testing.assert_close(wrapped.encode(images), latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(wrapped.decode(latents).clamp(-1, 1), decoded, rtol=1e-4, atol=1e-4)


def test_decoding_in_training_does_not_clamp(images: Tensor) -> None:
    """A clamped pixel has no gradient."""
    vae = qwen_image_vae()
    vae.module.requires_grad_(False)
    assert vae.decode(4 * vae.encode(images[:1])).abs().max() > 1.01
