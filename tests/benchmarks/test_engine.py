from pathlib import Path

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from benchmarks.engine import similarities
from models.zoo import load_engine

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "tiny-flux"


def test_ssim_of_the_benchmark_is_the_quality_of_curves(tmp_path: Path) -> None:
    engine = load_engine([CHECKPOINT], device="cpu", router_weights=tmp_path)
    assert engine.cards["tiny-flux"].quality_metric == "ssim"
    rng = np.random.default_rng(0)
    exact = rng.integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    images = exact.copy()
    images[1, ::2] //= 2
    (psnr, ssim), (lower_psnr, lower_ssim) = similarities(engine, "tiny-flux", images, exact)
    assert (psnr, ssim) == (np.inf, 1.0)
    assert lower_psnr < 20
    assert lower_ssim == engine.similarity("tiny-flux", images[1], exact[1])
    # Wang et al. 2004, with a uniform window of 7 pixels
    assert lower_ssim == pytest.approx(
        structural_similarity(images[1], exact[1], win_size=7, channel_axis=2, data_range=255)
    )
