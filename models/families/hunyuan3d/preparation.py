"""From a client's image to what Hunyuan3D's conditioner reads: the object alone, centred on white.

Sizes, rounding and OpenCV's filters are those of `ImageProcessorV2` (Tencent-Hunyuan/Hunyuan3D-2.1 at 5e3ec6d,
`hy3dshape/preprocessors.py`), bit for bit, so that an image gets the tokens that the denoiser was trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from skimage.morphology import remove_small_holes, remove_small_objects
from torch import Tensor

from models.errors import InvalidRequest
from models.request import BackgroundRemoval

BackgroundRemover = Callable[[np.ndarray], np.ndarray]
"""From colours `(height, width, 3)` to the object's alpha `(height, width)`, 0 where there is background.

Raises InvalidRequest if it can't find an object.
"""

_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
# CIE76 difference of colours; noise and compression stay below it.
_VISIBLE = 10.0
# Of a border that is plain; an object's edge may touch it.
_PLAIN_SHARE = 0.99
# Objects are looked for in images of at most this side, which bounds memory.
_SEARCH_SIDE = 1024
# Of that image's pixels; what is smaller is neither an object nor a hole in one.
_SPECK_SHARE = 0.0005


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """`size` in pixels; `border_ratio` is the share of the longer side that stays free around the object."""

    size: int = 512
    border_ratio: float = 0.15


def remove_plain_background(colours: np.ndarray) -> np.ndarray:
    """A BackgroundRemover for objects before a plain background: one colour or a smooth gradient, with some noise.

    A quadratic is fitted to the colours along the border, and the object is what differs from it visibly. So an object
    must not touch the border, its shadow counts as part of it, those of its parts that have the background's colour do
    not, and its outline is hard. Rooms and landscapes are refused.
    """
    height, width = colours.shape[:2]
    scale = min(1.0, _SEARCH_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.medianBlur(cv2.resize(colours, size, interpolation=cv2.INTER_AREA), 5)
    difference = np.linalg.norm(_lab(small / np.float32(255)) - _lab(_background(small)), axis=-1)
    plain = (_border(difference) < _VISIBLE).mean()
    needed = "try an image with transparency, or remove_background: false, which takes all of it for the object"
    if plain < _PLAIN_SHARE:
        raise _invalid(f"has a background that can't be removed: {1 - plain:.0%} of its border is not plain; {needed}")
    speck = round(_SPECK_SHARE * difference.size)
    mask = remove_small_holes(remove_small_objects(difference >= _VISIBLE, max_size=speck), max_size=speck)
    if not mask.any():
        raise _invalid(f"shows no object: nothing in it differs from the background; {needed}")
    return cv2.resize(mask.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_LINEAR)


def prepare_image(
    image: Image.Image,
    settings: ImageSettings,
    removal: BackgroundRemoval,
    remover: BackgroundRemover = remove_plain_background,
) -> Tensor:
    """`(1, 3, size, size)` float32 in [-1, 1]: the object, centred on white.

    Where no background is removed, the object is all that isn't fully transparent. Raises InvalidRequest if there is
    none, or if the image is of a kind that has no certain colours.
    """
    rgba = to_rgba(image)
    if removal is BackgroundRemoval.ALWAYS or (removal is BackgroundRemoval.AUTO and not has_transparency(rgba)):
        colours = on_white(rgba)
        rgba = np.dstack((colours, remover(colours)))
    colours = on_white(recentre(rgba, settings.border_ratio))
    resized = cv2.resize(colours, (settings.size, settings.size), interpolation=cv2.INTER_CUBIC)
    return torch.from_numpy(resized.astype(np.float32) / 255 * 2 - 1).permute(2, 0, 1)[None].contiguous()


def to_rgba(image: Image.Image) -> np.ndarray:
    """`(height, width, 4)`, turned as its EXIF tag says; upstream doesn't look at that, and photographs would lie."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):  # Pillow would cut off what is brighter than 255 of 65535
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
    if upright.mode not in _MODES:
        raise _invalid(f"has pixels of mode {upright.mode}; try RGB or RGBA with 8 bits a channel")
    return np.asarray(upright.convert("RGBA"))


def has_transparency(rgba: np.ndarray) -> bool:
    """Whether any pixel is more transparent than not; an alpha channel that is full throughout tells nothing."""
    return bool((rgba[..., 3] < 128).any())


def recentre(rgba: np.ndarray, border_ratio: float) -> np.ndarray:
    """Cut out what isn't fully transparent and put it into the middle of a transparent square, `(side, side, 4)`.

    `side` is the image's longer one. As upstream does it, the last row and column are lost, and colours are scaled as
    they are, so that those of transparent pixels bleed into the rim. Raises InvalidRequest if nothing is left.
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
    """Colours `(height, width, 3)`, rounded down as upstream."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _background(colours: np.ndarray) -> np.ndarray:
    """The quadratic in the place that fits the border's colours best, in [0, 1], everywhere."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, length, dtype=np.float32) for length in colours.shape[:2]), indexing="ij")
    terms = np.stack((np.ones_like(x), x, y, x * x, x * y, y * y), axis=-1)
    coefficients = np.linalg.lstsq(_border(terms), _border(colours / np.float32(255)))[0]
    return np.clip(terms @ coefficients, 0, 1)


def _border(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate((pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]))


def _lab(colours: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(colours, cv2.COLOR_RGB2Lab)


def _invalid(found: str) -> InvalidRequest:
    return InvalidRequest(f"input_image {found}", "input_image")
