"""`hunyuan3d21_cond`, `hunyuan3d20_cond`: how a picture is prepared and what DINOv2 makes of it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from models.families.hunyuan3d.conditioner import SingleImageEncoder
from models.families.hunyuan3d.preparation import PictureSettings, on_white, prepare_picture, recentre, to_rgba
from models.request import BackgroundRemoval

NEAR: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=["hunyuan3d21_cond", "hunyuan3d20_cond"])
def recording(request: pytest.FixtureRequest, recorded: Callable[[str], Any]) -> Any:
    return recorded(request.param)


@pytest.fixture(scope="module")
def settings(recording: Any) -> PictureSettings:
    return PictureSettings(**recording.settings["image_processor"])


@pytest.fixture(scope="module")
def conditioner(recording: Any) -> SingleImageEncoder:
    conditioner = SingleImageEncoder(**recording.settings["config"])
    conditioner.load_state_dict(recording.weights)
    return conditioner.requires_grad_(False)


def picture_of(recording: Any, mode: str) -> Image.Image:
    return Image.fromarray(recording.tensors[f"in/image_{mode}"].numpy())


@pytest.mark.parametrize("mode", ["rgba", "rgb"])
def test_picture_is_prepared_as_recorded(recording: Any, settings: PictureSettings, mode: str) -> None:
    expected = {name: recording.tensors[f"out/{mode}/{name}"] for name in ("recentered", "recentered_mask", "image")}
    picture = picture_of(recording, mode)
    canvas = recentre(to_rgba(picture), settings.border_ratio)
    np.testing.assert_array_equal(canvas[..., 3:], expected["recentered_mask"].numpy())
    np.testing.assert_array_equal(on_white(canvas), expected["recentered"].numpy())
    prepared = prepare_picture(picture, settings, BackgroundRemoval.NEVER)
    # OpenCV's resize may round halves otherwise on another CPU: some few values by one of their 255 levels.
    difference = (prepared - expected["image"]).abs()
    assert difference.max() < 1.01 * 2 / 255
    assert (difference > 1e-6).float().mean() < 1e-3


def test_image_tokens_are_those_recorded(recording: Any, conditioner: SingleImageEncoder) -> None:
    picture = recording.tensors["out/rgba/image"]
    encoder = conditioner.main_image_encoder
    made = {"pixel_values": encoder.pixel_values(picture)}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: made.update({name: output})

    encoder.model.embeddings.register_forward_hook(keep("embeddings"))
    for i, layer in enumerate(encoder.model.encoder.layer):
        layer.register_forward_hook(keep(f"layer.{i}"))
    made["cond"] = conditioner(picture)
    recorded = {
        name.removeprefix("out/"): tensor
        for name, tensor in recording.tensors.items()
        if name.startswith(("out/layer", "out/cond", "out/embeddings", "out/pixel_values"))
    }
    assert made.keys() == recorded.keys()
    for name, tensor in recorded.items():
        torch.testing.assert_close(made[name], tensor, **NEAR, msg=partial("{}: {}".format, name))
