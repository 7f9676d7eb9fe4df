"""Validates the mask of an edit and makes it one of a kind: transparent where the picture may change.

Masks come in two kinds. OpenAI's are transparent where the picture may change. Those of diffusers and most editors have
no transparency, and are white there.
"""

from io import BytesIO

import numpy as np
from PIL import Image, ImageChops

from models.errors import InvalidRequest
from service.api.input_image import KEPT_SIDE, checked_image

_KEPT_ALPHA = 128
"""The lowest alpha of what stays as it is, see `models.request.ImageEdit`."""


def checked_mask(data: bytes, size: tuple[int, int], *, max_pixels: int) -> bytes:
    """A PNG of `size` pixels, in RGBA, of the mask in `data`: transparent where the picture may change.

    `size` is the width and height of the checked picture that the mask is for. Raises InvalidImage as `checked_image`
    does, and InvalidRequest for a mask of another size and for one with which nothing may change. Not for two threads
    at once.
    """
    with Image.open(BytesIO(checked_image(data, "mask", max_pixels=max_pixels))) as image:
        if image.size != size:
            scaled = f", both scaled down to {KEPT_SIDE} a side" if max(*image.size, *size) == KEPT_SIDE else ""
            raise InvalidRequest(
                f"mask has {image.width}x{image.height} pixels and its picture {size[0]}x{size[1]}{scaled}; send a "
                f"mask of the picture's size",
                "mask",
            )
        has_alpha = image.mode == "RGBA"
        alpha = image.getchannel("A") if has_alpha else ImageChops.invert(image.convert("L"))
    if np.asarray(alpha).min() >= _KEPT_ALPHA:
        look = "transparent" if has_alpha else "white"
        raise InvalidRequest(
            f"mask is nowhere {look}, so nothing may change; make {look} what may change"
            + (", or send a mask without an alpha channel that is white there" if has_alpha else ""),
            "mask",
        )
    black = Image.new("L", size)
    file = BytesIO()
    Image.merge("RGBA", (black, black, black, alpha)).save(file, "PNG", compress_level=1)
    return file.getvalue()
