"""Prepares a client's image for Hunyuan3D's conditioner: the object alone, centred on white.

Sizes, rounding and OpenCV's filters are those of `ImageProcessorV2` (Tencent-Hunyuan/Hunyuan3D-2.1 at 5e3ec6d,
`hy3dshape/preprocessors.py`), bit for bit, so that the denoiser sees images prepared as in its training. The
server runs this in a process of its own, since a large image takes most of a second. It imports torch only for
backgrounds that are not plain.
"""

from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from models.background.cut_out import NotCutOut, object_alpha
from models.errors import InvalidRequest
from models.file_formats import OutputFormat, encode_image
from models.request import BackgroundRemoval, MeshRequest

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """`size` is the side in pixels, `border_ratio` the share of the longer side that stays free around the object."""

    size: int = 512
    border_ratio: float = 0.15


def prepared_request(request: MeshRequest, settings: ImageSettings, remover: Path | None) -> MeshRequest:
    """The request with its input image prepared. Raises what `prepare_pixels` raises."""
    with Image.open(BytesIO(request.input_image)) as image:
        pixels = prepare_pixels(image, settings, request.remove_background, remover)
    return replace(request, input_image=encode_image(pixels, OutputFormat.PNG), is_prepared=True)


def prepare_pixels(
    image: Image.Image, settings: ImageSettings, removal: BackgroundRemoval, remover: Path | None = None
) -> np.ndarray:
    """`(size, size, 3)` uint8: the object, centred on white.

    `remover` is the folder of the network for backgrounds that are not plain. Where no background is removed, every
    pixel that is not fully transparent belongs to the object. Raises InvalidRequest if there is no object, or if the
    image's mode does not define its colours.
    """
    rgba = to_rgba(image)
    if removal is BackgroundRemoval.ALWAYS or (removal is BackgroundRemoval.AUTO and not has_transparency(rgba)):
        colours = on_white(rgba)
        try:
            rgba = np.dstack((colours, object_alpha(colours, remover, is_whole=True)))
        except NotCutOut as error:
            raise _invalid(
                f"{error}; try another view of the object, an image with transparency, or remove_background: false, "
                "which takes the whole image as the object"
            ) from error
    colours = on_white(recentre(rgba, settings.border_ratio))
    return cv2.resize(colours, (settings.size, settings.size), interpolation=cv2.INTER_CUBIC)


def to_rgba(image: Image.Image) -> np.ndarray:
    """`(height, width, 4)`, turned upright by the EXIF tag. Upstream ignores the tag, and photographs lie on a side."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # Pillow would clip at 255 of 65535
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode not in _MODES:
        raise _invalid(f"has pixels of mode {upright.mode}; try RGB or RGBA with 8 bits a channel")
    return np.asarray(upright.convert("RGBA"))


def has_transparency(rgba: np.ndarray) -> bool:
    """Whether any pixel is more than half transparent. A fully opaque alpha channel says nothing about the object."""
    return bool((rgba[..., 3] < 128).any())


def recentre(rgba: np.ndarray, border_ratio: float) -> np.ndarray:
    """Cut out the pixels that are not fully transparent and centre them on a transparent square, `(side, side, 4)`.

    `side` is the image's longer side. As upstream, it loses the last row and column, and scales colours without regard
    to alpha, so that colours of transparent pixels bleed into the rim. Raises InvalidRequest if nothing is left.
    """
    height, width = rgba.shape[:2]
    rows, columns = (np.flatnonzero(rgba[..., 3].any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        raise _invalid(f"is fully transparent on all of its {width}x{height} pixels; it must show an object")
    cut_out = rgba[rows[0] : rows[-1], columns[0] : columns[-1]]
    side, longer = max(height, width), max(cut_out.shape[:2])
    scale = int(side * (1 - border_ratio)) / max(longer, 1)
    new_height, new_width = (int(length * scale) for length in cut_out.shape[:2])
    if not (new_height and new_width):
        size = f"{columns[-1] - columns[0] + 1}x{rows[-1] - rows[0] + 1}"
        raise _invalid(f"shows an object of {size} pixels, which is too thin; try a closer view of it")
    canvas = np.zeros((side, side, 4), np.uint8)
    top, left = (side - new_height) // 2, (side - new_width) // 2
    canvas[top : top + new_height, left : left + new_width] = cv2.resize(
        cut_out, (new_width, new_height), interpolation=cv2.INTER_AREA
    )
    return canvas


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Colours `(height, width, 3)` blended onto white, rounded down as upstream."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _invalid(found: str) -> InvalidRequest:
    return InvalidRequest(f"input_image {found}", "input_image")
