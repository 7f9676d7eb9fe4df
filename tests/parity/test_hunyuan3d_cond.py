"""`hunyuan3d21_cond`, `hunyuan3d20_cond`: the preparation of an image, and its DINOv2 tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from models.families.hunyuan3d.conditioner import SingleImageEncoder, image_tensor
from models.families.hunyuan3d.preparation import ImageSettings, on_white, prepare_pixels, recentre, to_rgba
from models.request import BackgroundRemoval

NEAR: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=["hunyuan3d21_cond", "hunyuan3d20_cond"])
def recording(request: pytest.FixtureRequest, recorded: Callable[[str], Any]) -> Any:
    return recorded(request.param)


@pytest.fixture(scope="module")
def settings(recording: Any) -> ImageSettings:
    return ImageSettings(**recording.settings["image_processor"])


@pytest.fixture(scope="module")
def conditioner(recording: Any) -> SingleImageEncoder:
    conditioner = SingleImageEncoder(**recording.settings["config"])
    conditioner.load_state_dict(recording.weights)
    return conditioner.requires_grad_(False)


def image_of(recording: Any, mode: str) -> Image.Image:
    return Image.fromarray(recording.tensors[f"in/image_{mode}"].numpy())


@pytest.mark.parametrize("mode", ["rgba", "rgb"])
def test_image_is_prepared_as_recorded(recording: Any, settings: ImageSettings, mode: str) -> None:
    expected = {name: recording.tensors[f"out/{mode}/{name}"] for name in ("recentered", "recentered_mask", "image")}
    image = image_of(recording, mode)
    canvas = recentre(to_rgba(image), settings.border_ratio)
    np.testing.assert_array_equal(canvas[..., 3:], expected["recentered_mask"].numpy())
    np.testing.assert_array_equal(on_white(canvas), expected["recentered"].numpy())
    prepared = image_tensor(prepare_pixels(image, settings, BackgroundRemoval.NEVER))
    # OpenCV's resize may round halves differently on another CPU: a few values differ by one of 255 levels.
    difference = (prepared - expected["image"]).abs()
    assert difference.max() < 1.01 * 2 / 255
    assert (difference > 1e-6).float().mean() < 1e-3


def test_image_tokens_are_as_recorded(recording: Any, conditioner: SingleImageEncoder) -> None:
    image = recording.tensors["out/rgba/image"]
    encoder = conditioner.main_image_encoder
    computed = {"pixel_values": encoder.pixel_values(image)}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: computed.update({name: output})

    encoder.model.embeddings.register_forward_hook(keep("embeddings"))
    for i, layer in enumerate(encoder.model.encoder.layer):
        layer.register_forward_hook(keep(f"layer.{i}"))
    computed["cond"] = conditioner(image)
    recorded = {
        name.removeprefix("out/"): tensor
        for name, tensor in recording.tensors.items()
        if name.startswith(("out/layer", "out/cond", "out/embeddings", "out/pixel_values"))
    }
    assert computed.keys() == recorded.keys()
    for name, tensor in recorded.items():
        torch.testing.assert_close(computed[name], tensor, **NEAR, msg=partial("{}: {}".format, name))
