"""A client's picture, checked before memory is spent on it, and made into one that is certain.

Whatever a client calls it, the content decides what a file is. What passes on are pixels alone: colour profiles, texts
and whatever else stands in the file, or behind the picture's end, stay here.
"""

import base64
import binascii
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import InvalidImage

FORMATS = ("PNG", "JPEG", "WEBP")
MIN_SIDE = 8
MAX_SIDE = 16_384
KEPT_SIDE = 2048
"""Models see 512 pixels a side, and objects are centred in squares of the picture's longer one."""

MAX_SCANS = 100
"""A progressive JPEG has some ten, each of which goes over all pixels."""

_JPEG, _SCAN = b"\xff\xd8", b"\xff\xda"

# What Pillow raises on files that are not what they say, found by mutating some.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error, IndexError, OverflowError)
_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


def decode_base64_picture(text: str) -> bytes:
    """The bytes of base64 text, or of a `data:` URL of it. Raises InvalidImage if it is neither."""
    given = text.strip()
    if given[:5].lower() == "data:":
        head, comma, given = given.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidImage("input_image is a data: URL without base64; write data:image/png;base64,…")
    elif "://" in given[:16]:
        raise InvalidImage("input_image is an address, and this server fetches nothing; send the picture itself")
    try:
        data = base64.b64decode("".join(given.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidImage(f"input_image is not base64: {error}") from error
    if not data:
        raise InvalidImage("input_image is empty")
    return data


def checked_picture(data: bytes, *, max_pixels: int) -> bytes:
    """A PNG of the one picture in `data`, RGB or RGBA with 8 bits a channel, upright, at most `KEPT_SIDE` a side.

    Sides and number of pictures are looked at before pixels are decoded. Raises InvalidImage. Filters of warnings are
    set meanwhile, which belong to the process: not for two threads at once.
    """
    if data.startswith(_JPEG) and data.count(_SCAN) > MAX_SCANS:
        raise InvalidImage(f"input_image has {data.count(_SCAN)} scans; {MAX_SCANS} at most, so that decoding ends")
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that we have limits for, and of faults that a picture survives.
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=FORMATS) as picture:
                _check_size(picture, max_pixels)
                _check_single(picture)
                picture.load()
                pixels = _eight_bits(picture)
                pixels.thumbnail((KEPT_SIDE, KEPT_SIDE))
    except UnidentifiedImageError as error:
        raise InvalidImage(f"input_image is no picture that can be read; send {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise InvalidImage(f"input_image is too large, {max_pixels} pixels at most: {error}") from error
    except _BROKEN as error:
        raise InvalidImage(f"input_image is damaged: {error}") from error
    file = BytesIO()
    pixels.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _check_size(picture: Image.Image, max_pixels: int) -> None:
    width, height = picture.size
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
        raise InvalidImage(
            f"input_image has {width}x{height} pixels; sides can be from {MIN_SIDE} to {MAX_SIDE} pixels"
        )
    if width * height > max_pixels:
        raise InvalidImage(f"input_image has {width}x{height} pixels, {width * height} in all; {max_pixels} at most")


def _check_single(picture: Image.Image) -> None:
    number = getattr(picture, "n_frames", 1)
    # Of phones' MPO files the first picture is the photograph.
    if number > 1 and picture.format != "MPO":
        raise InvalidImage(f"input_image has {number} frames; send one still picture")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The decoded picture upright, in RGB or RGBA, without anything but its pixels."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in _16_BITS:  # Pillow would cut off all that is brighter than 255 of 65535
        upright = Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8))
    has_alpha = upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info
    converted = upright.convert("RGBA" if has_alpha else "RGB")
    return Image.frombytes(converted.mode, converted.size, converted.tobytes())
