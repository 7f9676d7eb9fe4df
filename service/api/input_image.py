"""Validates an upload and re-encodes its pixels as a clean PNG.

The content of a file decides its format, not the client's media type. Only pixels pass on: colour profiles, texts,
other metadata and data after the image's end are dropped. Sizes are checked before memory is spent on decoding.
"""

import base64
import binascii
import string
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from service.errors import InvalidImage

FORMATS = ("PNG", "JPEG", "WEBP")
MIN_SIDE = 8
MAX_SIDE = 16_384
KEPT_SIDE = 2048
"""Larger images are scaled down. Models see 512 pixels a side, of a square as wide as the longer side of the image."""

MAX_SCANS = 100
"""Scans of a JPEG. A progressive JPEG has about ten, and decoding each one visits all pixels."""

MAX_PARTS = 500
"""Segments of a JPEG before its first scan; chunks of a PNG beyond one for each `_PNG_PART_BYTES` of its file.

Pillow reads them in Python, so many small parts cost time.
"""

_JPEG_HEAD_BYTES = 262_144
"""Four full segments: Pillow skips segments that it does not know byte by byte."""

_PNG_PART_BYTES = 4096
"""Half the size of the chunks of pixels that libpng writes."""

_PNG, _JPEG, _SCAN = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xda"
_PNG_PARTS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_EXIF_BYTES = 65_533  # the longest content of a JPEG segment

# Errors that Pillow raises on damaged files, found by mutating files.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error, IndexError, OverflowError)
_TURNS: dict[object, Image.Transpose] = {  # by Exif orientation; other values may occur
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITESPACE = string.whitespace.encode()
_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class _Refused(Exception):
    """The image cannot be used. The message goes on after the name of its field."""


def decode_base64_image(text: str, field: str = "input_image") -> bytes:
    """The bytes of base64 text or of a base64 `data:` URL, given in `field`. Raises InvalidImage for any other text."""
    try:
        return _decoded(text)
    except _Refused as error:
        raise InvalidImage(f"{field} {error}", field) from error


def checked_image(data: bytes, field: str = "input_image", *, max_pixels: int) -> bytes:
    """A PNG of the single image in `data`: RGB or RGBA, 8 bits a channel, upright, at most `KEPT_SIDE` a side.

    Parts of the file that do not describe pixels are removed before Pillow opens it, since Pillow keeps and joins them.
    Sides and number of frames are checked before pixels are decoded. Raises InvalidImage, which names `field`. Not for
    two threads at once: it changes the warning filters, which belong to the process.
    """
    try:
        return _checked(data, max_pixels)
    except _Refused as error:
        raise InvalidImage(f"{field} {error}", field) from error


def _decoded(text: str) -> bytes:
    given = text.strip()
    if given[:5].lower() == "data:":
        head, comma, given = given.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise _Refused("is a data: URL without base64; write data:image/png;base64,…")
    elif "://" in given[:16]:
        raise _Refused("is a URL, which this server does not fetch; send the image itself")
    try:
        # As bytes: `given.split()` makes a string of each piece, which are millions if there are spaces between all.
        data = base64.b64decode(given.encode("ascii").translate(None, _WHITESPACE), validate=True)
    except (binascii.Error, ValueError) as error:
        raise _Refused(f"is not base64: {error}") from error
    if not data:
        raise _Refused("is empty")
    return data


def _checked(data: bytes, max_pixels: int) -> bytes:
    if data.startswith(_JPEG) and data.count(_SCAN) > MAX_SCANS:
        raise _Refused(f"has {data.count(_SCAN)} scans; at most {MAX_SCANS} are accepted")
    if data.startswith(_JPEG):
        data = _jpeg_of_pixels(data)
    elif data.startswith(_PNG):
        data = _png_of_pixels(data)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images, for which we have limits, and of faults that do not prevent decoding.
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                _check_size(image, max_pixels)
                _check_single(image)
                image.load()
                if image.format == "PNG":
                    _scale_colour_key(image, depth=data[24])
                # Scaled down first, so that the next steps copy less.
                converted = _eight_bits(image)
                converted.thumbnail((KEPT_SIDE, KEPT_SIDE))
                upright = _upright(converted)
                pixels = Image.frombytes(upright.mode, upright.size, upright.tobytes())
    except UnidentifiedImageError as error:
        raise _Refused(f"is not a readable image; send {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise _Refused(f"is too large; at most {max_pixels} pixels are accepted: {error}") from error
    except _BROKEN as error:
        raise _Refused(f"is damaged: {error}") from error
    file = BytesIO()
    pixels.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _jpeg_of_pixels(data: bytes) -> bytes:
    """The file without texts, profiles, data between segments, and the index of the extra images that phones append.

    The first image of a phone's file is the photograph.
    """
    kept, seen = [_JPEG], set()
    place, number = 2, 0
    while data[place : place + 2] != _SCAN and place + 4 <= len(data):
        number += 1
        if number > MAX_PARTS:
            raise _Refused(f"has more than {MAX_PARTS} segments before its pixels; save it without them")
        marker = data[place + 1]
        if data[place] != 0xFF or marker in (0x00, 0xFF):  # fill bytes and junk, which decoders skip
            place += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:  # these have no length
            place += 2
            continue
        end = place + 2 + max(2, int.from_bytes(data[place + 2 : place + 4]))
        segment = data[place:end]
        is_application = 0xE0 <= marker <= 0xEF or marker == 0xFE
        # JFIF and Adobe segments say how colours are stored, the first Exif segment which side is up.
        names = {0xE0: b"JFIF", 0xE1: b"Exif\0\0", 0xEE: b"Adobe"}
        is_needed = marker in names and marker not in seen and segment[4:].startswith(names[marker])
        if is_needed or not is_application:
            kept.append(segment)
            seen.add(marker)
        place = end
    if data[place : place + 2] != _SCAN:
        raise _Refused("is damaged: it is a JPEG that ends before its pixels")
    head = b"".join(kept)
    if len(head) > _JPEG_HEAD_BYTES:
        raise _Refused(f"has {len(head)} bytes before its pixels; at most {_JPEG_HEAD_BYTES} are accepted")
    return head + data[place:]


def _png_of_pixels(data: bytes) -> bytes:
    """The file without texts, profiles and data after its end. Raises InvalidImage if it is animated."""
    if data[12:16] != b"IHDR":
        raise _Refused("is damaged: it is a PNG that doesn't begin with its size")
    kept, place, number, has_exif = [_PNG], len(_PNG), 0, False
    most = MAX_PARTS + len(data) // _PNG_PART_BYTES
    while place < len(data):
        number += 1
        if number > most:
            raise _Refused(f"has more than {most} chunks; save it with fewer and larger ones")
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        if kind == b"acTL" and (frames := int.from_bytes(data[place + 8 : place + 12])) > 1:
            raise _Refused(f"has {frames} frames; send a single still image")
        end = place + length + 12
        is_exif = kind == b"eXIf" and not has_exif and length <= _EXIF_BYTES
        if kind in _PNG_PARTS or is_exif or kind[:1].isupper():  # unknown critical chunks stay: Pillow refuses them
            kept.append(data[place:end])
            has_exif = has_exif or is_exif
        if kind == b"IEND":
            break
        place = end
    return b"".join(kept)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
        raise _Refused(f"has {width}x{height} pixels; sides can be from {MIN_SIDE} to {MAX_SIDE} pixels")
    if width * height > max_pixels:
        raise _Refused(f"has {width}x{height} pixels, {width * height} in all; at most {max_pixels} are accepted")


def _check_single(image: Image.Image) -> None:
    number = getattr(image, "n_frames", 1)
    if number > 1:
        raise _Refused(f"has {number} frames; send a single still image")


def _upright(image: Image.Image) -> Image.Image:
    """Turn the image as its Exif says. ImageOps.exif_transpose also rewrites the Exif, which fails on some images."""
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    return image if turn is None else image.transpose(turn)


def _scale_colour_key(image: Image.Image, depth: int) -> None:
    """Scale the transparent colour to 8 bits, as Pillow does with the pixels only."""
    key = image.info.get("transparency")
    if image.mode == "L" and isinstance(key, int) and depth in (2, 4):
        image.info["transparency"] = key * 255 // (2**depth - 1)
    elif image.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _eight_bits(image: Image.Image) -> Image.Image:
    """The decoded image in RGB or RGBA, itself if it already is."""
    if image.mode in _16_BITS:  # Pillow would clip all values above 255 of 65535
        return _eight_bits_of_grey(image)
    has_alpha = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    mode = "RGBA" if has_alpha else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _eight_bits_of_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    key = image.info.get("transparency")
    if isinstance(key, int):
        made = Image.merge(
            "RGBA", (grey, grey, grey, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
        )
    else:
        made = grey.convert("RGB")
    if "exif" in image.info:
        made.info["exif"] = image.info["exif"]
    return made
