"""Which backgrounds are removed by their colour and which by the network, and what is refused."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from models.background.cut_out import NotCutOut, object_alpha
from tests.fixtures.cut_outs import REMOVER, ball_before, gravel, mask_iou

GREY = np.full((160, 160, 3), 90, np.uint8)


def test_ball_is_cut_out_of_a_plain_background_without_a_network() -> None:
    picture, is_ball = ball_before(GREY)
    assert mask_iou(object_alpha(picture, None, is_whole=True), is_ball) > 0.97


def test_ball_is_cut_out_of_gravel_by_the_network() -> None:
    picture, is_ball = ball_before(gravel())
    alpha = object_alpha(picture, REMOVER, is_whole=True)
    assert mask_iou(alpha, is_ball) > 0.98
    assert not alpha[:40].any()  # no haze, which would count as a part of the object
    assert np.unique(alpha).size > 2  # the outline is soft


def test_alpha_has_the_size_of_the_picture() -> None:
    picture, is_ball = ball_before(gravel(240))
    wide = np.hstack((picture, gravel(240)))
    alpha = object_alpha(wide, REMOVER, is_whole=True)
    assert alpha.shape == (240, 480)
    assert mask_iou(alpha, np.hstack((is_ball, np.zeros_like(is_ball)))) > 0.97


def test_busy_background_is_refused_without_a_network() -> None:
    with pytest.raises(NotCutOut, match="not plain, and no network"):
        object_alpha(ball_before(gravel())[0], None, is_whole=True)


@pytest.mark.parametrize("picture", [GREY, gravel()], ids=["plain", "gravel"])
def test_picture_without_an_object_is_refused(picture: np.ndarray) -> None:
    with pytest.raises(NotCutOut, match="shows no object"):
        object_alpha(picture, REMOVER, is_whole=True)


def test_picture_without_a_background_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    remover = SimpleNamespace(alpha=lambda colours, is_whole: np.full(colours.shape[:2], 255, np.uint8))
    monkeypatch.setattr("models.background.remover.load_remover", lambda folder: remover)
    with pytest.raises(NotCutOut, match="shows no background: what stands out covers 100% of it"):
        object_alpha(gravel(), REMOVER, is_whole=False)


def test_whole_object_has_no_parts_beyond_the_border() -> None:
    picture, is_ball = ball_before(gravel())
    picture[:, :40] = (200, 30, 30)
    assert mask_iou(object_alpha(picture, REMOVER, is_whole=True), is_ball) > 0.97


def test_the_same_picture_gives_the_same_alpha() -> None:
    picture, _ = ball_before(gravel())
    np.testing.assert_array_equal(
        object_alpha(picture, REMOVER, is_whole=True), object_alpha(picture, REMOVER, is_whole=True)
    )


def test_plain_background_needs_no_torch() -> None:
    program = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from models.families.hunyuan3d import preparation\n"
        "picture = np.full((80, 80, 3), 90, np.uint8); picture[20:60, 20:60] = (200, 0, 0)\n"
        f"assert preparation.object_alpha(picture, Path({str(REMOVER)!r}), is_whole=True).any()\n"
        "print('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "False"
