"""Large pictures are decoded in tiles. Here most sizes are a quarter of what they are."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from models.families import tiling
from training.scenes.rendering import render
from training.scenes.scenes import training_scene


@pytest.fixture
def quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "MOST_WHOLE_PIXELS", 256 * 256)
    monkeypatch.setattr(tiling, "_SIDES", range(16, 33, 4))


def test_tiles_show_no_seams(quarter: None) -> None:
    vae = AutoencoderKL.from_pretrained(Path("checkpoints/tiny-flux/vae"))
    [picture] = render([training_scene(3)], 320)
    with torch.inference_mode():
        latents = vae.encode(picture[None]).latent_dist.mode()
        view = tiling.for_size(vae, 320, 320, 8)
        whole, tiled = (decoder.decode(latents, return_dict=False)[0].clamp(-1, 1) * 127.5 for decoder in (vae, view))
    assert not vae.use_tiling
    error = (whole - tiled).abs()
    assert 0 < error.max() < 16
    # A seam would raise the error along its line, far above what it is on the whole.
    assert error.mean(dim=(1, 2)).max() < 4
    assert error.mean(dim=(1, 3)).max() < 4
    assert (255**2 / (error**2).mean()).log10() * 10 > 40


def test_size_alone_decides(quarter: None) -> None:
    vae = AutoencoderKL.from_pretrained(Path("checkpoints/tiny-flux/vae"))
    assert tiling.for_size(vae, 256, 256, 8) is vae
    assert tiling.for_size(vae, 512, 128, 8) is vae  # no more pixels, if more on one side
    assert tiling.for_size(vae, 264, 256, 8) is not vae


def test_no_tile_is_thin() -> None:
    """For all sizes up to 2048 that are tiled and not very long."""
    for height in range(32, 257, 2):
        for width in range(max(height, 128 * 128 // height + 1), 257, 2):
            side = tiling._side_of_tiles(height, width)
            assert all(min(side, (length - 1) % (side * 3 // 4) + 1) >= 32 for length in (height, width))
