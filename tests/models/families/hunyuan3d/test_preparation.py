"""When the background of an input image is removed."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.errors import InvalidRequest
from models.families.hunyuan3d.preparation import ImageSettings, prepare_pixels
from models.request import BackgroundRemoval
from tests.fixtures.cut_outs import REMOVER, ball_before, gravel

AUTO, ALWAYS, NEVER = BackgroundRemoval.AUTO, BackgroundRemoval.ALWAYS, BackgroundRemoval.NEVER
SETTINGS = ImageSettings(size=64)
PICTURE, IS_BALL = ball_before(gravel())


def prepared(pixels: np.ndarray, removal: BackgroundRemoval, remover: Path | None = REMOVER) -> np.ndarray:
    return prepare_pixels(Image.fromarray(pixels), SETTINGS, removal, remover)


def with_alpha(is_opaque: np.ndarray) -> np.ndarray:
    return np.dstack((PICTURE, is_opaque.astype(np.uint8) * 255))


CLEAN = prepared(with_alpha(IS_BALL), NEVER)


@pytest.mark.parametrize("removal", [AUTO, ALWAYS])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_opaque_picture_is_prepared_as_its_object_alone(mode: str, removal: BackgroundRemoval) -> None:
    pixels = PICTURE if mode == "RGB" else with_alpha(np.ones_like(IS_BALL))
    assert np.abs(prepared(pixels, removal).astype(int) - CLEAN).mean() < 5


def test_picture_is_taken_as_it_is_where_nothing_is_removed() -> None:
    taken = prepared(PICTURE, NEVER)
    assert np.abs(taken.astype(int) - CLEAN).mean() > 20
    np.testing.assert_array_equal(taken, prepared(PICTURE, NEVER, None))


def test_transparency_says_what_the_object_is_unless_removal_is_asked_for() -> None:
    is_left = np.broadcast_to(np.arange(320) < 310, (320, 320))  # gravel at the left of a transparent strip
    kept = prepared(with_alpha(is_left), AUTO)
    np.testing.assert_array_equal(kept, prepared(with_alpha(is_left), NEVER))
    assert np.abs(prepared(with_alpha(is_left), ALWAYS).astype(int) - CLEAN).mean() < 6


@pytest.mark.parametrize(
    ("pixels", "remover", "message"),
    [
        (PICTURE, None, "has a background that is not plain, and no network that removes others is installed"),
        (gravel(), REMOVER, "shows no object that stands out"),
    ],
)
def test_refusal_says_what_to_send_instead(pixels: np.ndarray, remover: Path | None, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        prepared(pixels, AUTO, remover)
    assert caught.value.param == "input_image"
    assert "try another view of the object, an image with transparency, or remove_background: false" in str(
        caught.value
    )
