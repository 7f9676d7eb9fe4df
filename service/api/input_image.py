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
from PIL import ExifTags, Image, UnidentifiedImageError

from service.errors import InvalidImage

FORMATS = ("PNG", "JPEG", "WEBP")
MIN_SIDE = 8
MAX_SIDE = 16_384
KEPT_SIDE = 2048
"""Models see 512 pixels a side, and objects are centred in squares of the picture's longer one."""

MAX_SCANS = 100
"""A progressive JPEG has some ten, each of which goes over all pixels."""

MAX_PARTS = 500
"""Of a JPEG before its first scan; of a PNG, besides one for each `_PNG_PART_BYTES`. Pillow reads them in Python."""

_JPEG_HEAD_BYTES = 262_144
"""Four full segments: Pillow passes over those that it doesn't know byte by byte."""

_PNG_PART_BYTES = 4096
"""Half of what libpng writes into one chunk of pixels."""

_PNG, _JPEG, _SCAN = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xda"
_PNG_PARTS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_EXIF_BYTES = 65_533  # the most that a JPEG's segment holds

# What Pillow raises on files that are not what they say, found by mutating some.
_BROKEN = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error, IndexError, OverflowError)
_TURNS: dict[object, Image.Transpose] = {  # Exif's orientation, which may be anything
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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

    Parts of the file that say nothing of its pixels are left out before Pillow sees it, since it keeps and joins them;
    sides and number of pictures are looked at before pixels are decoded. Raises InvalidImage. Filters of warnings are
    set meanwhile, which belong to the process: not for two threads at once.
    """
    if data.startswith(_JPEG) and data.count(_SCAN) > MAX_SCANS:
        raise InvalidImage(f"input_image has {data.count(_SCAN)} scans; {MAX_SCANS} at most, so that decoding ends")
    if data.startswith(_JPEG):
        data = _jpeg_of_pixels(data)
    elif data.startswith(_PNG):
        data = _png_of_pixels(data)
    try:
        with warnings.catch_warnings():
            # Pillow warns of sizes that we have limits for, and of faults that a picture survives.
            warnings.simplefilter("ignore")
            with Image.open(BytesIO(data), formats=FORMATS) as picture:
                _check_size(picture, max_pixels)
                _check_single(picture)
                picture.load()
                if picture.format == "PNG":
                    _scale_colour_key(picture, depth=data[24])
                # Made smaller first, so that what follows copies little.
                converted = _eight_bits(picture)
                converted.thumbnail((KEPT_SIDE, KEPT_SIDE))
                upright = _upright(converted)
                pixels = Image.frombytes(upright.mode, upright.size, upright.tobytes())
    except UnidentifiedImageError as error:
        raise InvalidImage(f"input_image is no picture that can be read; send {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise InvalidImage(f"input_image is too large, {max_pixels} pixels at most: {error}") from error
    except _BROKEN as error:
        raise InvalidImage(f"input_image is damaged: {error}") from error
    file = BytesIO()
    pixels.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _jpeg_of_pixels(data: bytes) -> bytes:
    """The file without texts, profiles, what stands between segments, and the index that phones give to their several
    pictures, of which the first is the photograph.
    """
    kept, seen = [_JPEG], set()
    place, number = 2, 0
    while data[place : place + 2] != _SCAN and place + 4 <= len(data):
        number += 1
        if number > MAX_PARTS:
            raise InvalidImage(
                f"input_image has more than {MAX_PARTS} segments before its pixels; save it without them"
            )
        marker = data[place + 1]
        if data[place] != 0xFF or marker in (0x00, 0xFF):  # fill bytes and junk, which readers pass over
            place += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:  # these have no length
            place += 2
            continue
        end = place + 2 + max(2, int.from_bytes(data[place + 2 : place + 4]))
        segment = data[place:end]
        is_application = 0xE0 <= marker <= 0xEF or marker == 0xFE
        # JFIF's and Adobe's tell how colours are stored, the first Exif which side is up.
        names = {0xE0: b"JFIF", 0xE1: b"Exif\0\0", 0xEE: b"Adobe"}
        is_needed = marker in names and marker not in seen and segment[4:].startswith(names[marker])
        if is_needed or not is_application:
            kept.append(segment)
            seen.add(marker)
        place = end
    if data[place : place + 2] != _SCAN:
        raise InvalidImage("input_image is damaged: it is a JPEG that ends before its pixels")
    head = b"".join(kept)
    if len(head) > _JPEG_HEAD_BYTES:
        raise InvalidImage(f"input_image has {len(head)} bytes before its pixels; {_JPEG_HEAD_BYTES} at most")
    return head + data[place:]


def _png_of_pixels(data: bytes) -> bytes:
    """The file without texts, profiles and what follows its end. Raises InvalidImage if it is animated."""
    if data[12:16] != b"IHDR":
        raise InvalidImage("input_image is damaged: it is a PNG that doesn't begin with its size")
    kept, place, number, has_exif = [_PNG], len(_PNG), 0, False
    most = MAX_PARTS + len(data) // _PNG_PART_BYTES
    while place < len(data):
        number += 1
        if number > most:
            raise InvalidImage(f"input_image has more than {most} chunks; save it with fewer and larger ones")
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        if kind == b"acTL" and (frames := int.from_bytes(data[place + 8 : place + 12])) > 1:
            raise InvalidImage(f"input_image has {frames} frames; send one still picture")
        end = place + length + 12
        is_exif = kind == b"eXIf" and not has_exif and length <= _EXIF_BYTES
        if kind in _PNG_PARTS or is_exif or kind[:1].isupper():  # what is critical and unknown is Pillow's to refuse
            kept.append(data[place:end])
            has_exif = has_exif or is_exif
        if kind == b"IEND":
            break
        place = end
    return b"".join(kept)


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
    if number > 1:
        raise InvalidImage(f"input_image has {number} frames; send one still picture")


def _upright(picture: Image.Image) -> Image.Image:
    """ImageOps.exif_transpose would write the Exif anew as well, and fails on some that can be read."""
    turn = _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    return picture if turn is None else picture.transpose(turn)


def _scale_colour_key(picture: Image.Image, depth: int) -> None:
    """Pillow brings grey and colours to 8 bits, and leaves the one that is transparent as it stands in the file."""
    key = picture.info.get("transparency")
    if picture.mode == "L" and isinstance(key, int) and depth in (2, 4):
        picture.info["transparency"] = key * 255 // (2**depth - 1)
    elif picture.mode == "RGB" and isinstance(key, tuple) and depth == 16:
        picture.info["transparency"] = tuple(value >> 8 for value in key)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The decoded picture in RGB or RGBA; itself, if it is that already."""
    if picture.mode in _16_BITS:  # Pillow would cut off all that is brighter than 255 of 65535
        return _eight_bits_of_grey(picture)
    has_alpha = picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info
    mode = "RGBA" if has_alpha else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def _eight_bits_of_grey(picture: Image.Image) -> Image.Image:
    values = np.asarray(picture)
    grey = Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    key = picture.info.get("transparency")
    if isinstance(key, int):
        made = Image.merge(
            "RGBA", (grey, grey, grey, Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
        )
    else:
        made = grey.convert("RGB")
    if "exif" in picture.info:
        made.info["exif"] = picture.info["exif"]
    return made
