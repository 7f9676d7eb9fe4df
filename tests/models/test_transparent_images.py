"""Cutting the object out of a finished image. `tests/end_to_end/test_images.py` does it with a trained model."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from models.curve import EXACT, Preset
from models.engine import Engine
from models.errors import InvalidRequest
from models.request import ImageRequest, PresetBudget
from tests.fixtures.cut_outs import REMOVER, ball_before, gravel, mask_iou


def finish(pixels: np.ndarray, *, is_transparent: bool) -> Any:
    """What the engine makes of an image that was decoded to `pixels`."""
    family = SimpleNamespace(decode=lambda state: pixels, background_remover=REMOVER, device=torch.device("cpu"))
    request = ImageRequest(
        model="drawn",
        prompt="a ball",
        height=len(pixels),
        width=len(pixels),
        num_inference_steps=1,
        guidance_scale=1.0,
        seed=0,
        budget=PresetBudget(Preset.EXACT),
        point=EXACT,
        is_guided=False,
        is_transparent=is_transparent,
    )
    state = SimpleNamespace(request=request, is_done=True)
    return Engine({"drawn": cast(Any, family)}, {}).finish(cast(Any, state))


def test_object_is_opaque_and_the_rest_transparent() -> None:
    picture, is_ball = ball_before(gravel())
    pixels = finish(picture, is_transparent=True)
    np.testing.assert_array_equal(pixels[..., :3], picture)
    assert mask_iou(pixels[..., 3], is_ball) > 0.98
    assert finish(picture, is_transparent=False) is picture


def test_object_that_the_image_cuts_off_is_kept_up_to_the_border() -> None:
    picture, is_ball = ball_before(gravel())
    half = picture[:, 160:], is_ball[:, 160:]
    assert mask_iou(finish(half[0], is_transparent=True)[..., 3], half[1]) > 0.97


def test_image_without_an_object_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"the generated image shows no object .* try another seed") as caught:
        finish(gravel(), is_transparent=True)
    assert caught.value.param == "background"
