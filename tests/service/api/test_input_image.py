import base64
import resource
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.api.input_image import KEPT_SIDE, checked_image, decode_base64_image
from service.errors import InvalidImage

MAX_PIXELS = 4_000_000


def opened(data: bytes) -> Image.Image:
    """The picture that comes out, which must be a plain PNG."""
    picture = Image.open(BytesIO(checked_image(data, max_pixels=MAX_PIXELS)))
    picture.load()
    assert picture.format == "PNG"
    assert picture.mode in ("RGB", "RGBA")
    assert not picture.getexif()
    return picture


def saved(picture: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def test_hostile_pictures_are_refused_or_become_plain_ones(hostile_pictures: dict[str, bytes]) -> None:
    assert len(hostile_pictures) > 200
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept = 0
    for name, data in hostile_pictures.items():
        try:
            picture = opened(data)
        except InvalidImage:
            continue
        kept += 1
        assert max(picture.size) <= KEPT_SIDE, name
    assert 20 < kept < len(hostile_pictures) - 60
    # In KiB: a picture of the largest size takes 16 MB a copy.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("50,000 pixels a side", "too large; at most 4000000 pixels"),
        ("webp canvas", "too large; at most 4000000 pixels"),
        ("50,000 of one", "50000x8"),
        ("one pixel", "1x1"),
        ("animated png", "2 frames"),
        ("animated webp", "2 frames"),
        ("gif", "PNG, JPEG, WEBP"),
        ("svg", "PNG, JPEG, WEBP"),
        ("cut off", "damaged"),
        ("jpeg cut off", "damaged"),
        ("webp cut off", "damaged"),
        ("scan bomb", "scans"),
        ("many segments", "more than 500 segments"),
        ("exif in pieces", "more than 500 segments"),
        ("fill bytes", "more than 500 segments"),
        ("unknown segments", "bytes before its pixels; at most 262144"),
        ("many chunks", "more than [0-9]+ chunks"),
        ("many pieces of pixels", "more than [0-9]+ chunks"),
        ("palette before size", "begin with its size"),
    ],
)
def test_refusals_say_what_is_wrong(hostile_pictures: dict[str, bytes], name: str, says: str) -> None:
    with pytest.raises(InvalidImage, match=says):
        checked_image(hostile_pictures[name], max_pixels=MAX_PIXELS)


@pytest.mark.parametrize(
    "name",
    ["text bomb", "profile bomb", "exif bomb", "index bomb", "exif that can't be written", "phone's two pictures"],
)
def test_what_is_no_pixel_is_not_even_read(hostile_pictures: dict[str, bytes], name: str) -> None:
    assert opened(hostile_pictures[name]).size in ((32, 32), (48, 64), (64, 48))


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("PNG", {"compress_level": 1}), ("JPEG", {"exif": True}), ("WEBP", {"quality": 1, "method": 0})],
)
def test_largest_picture_takes_a_few_times_its_pixels(file_format: str, options: dict[str, Any]) -> None:
    """In a process of its own: the peak of this one may be higher already."""
    if "exif" in options:
        options["exif"] = Image.Exif()
        options["exif"][0x112] = 6
    data = saved(Image.new("RGB", (4000, 4000), (9, 99, 200)), file_format, **options)
    script = (
        "import resource, sys; from service.api.input_image import checked_image; data = sys.stdin.buffer.read();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024; before = peak();"
        "checked_image(data, max_pixels=16_000_000); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    assert int(done.stdout) < 3.5 * 4 * 16_000_000


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation: int) -> None:
    quarters = np.zeros((40, 64, 3), np.uint8)
    quarters[:20, :32], quarters[20:, 32:] = (255, 0, 0), (0, 0, 255)
    upright = Image.fromarray(quarters)
    undo = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x112] = orientation
    picture = opened(saved(stored, exif=exif))
    assert np.array_equal(np.asarray(picture), quarters)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("LA", (90, 120), (90, 90, 90, 120)),
        ("RGBA", (1, 2, 3, 4), (1, 2, 3, 4)),
        ("I;16", 0x8040, (128, 128, 128)),
    ],
)
def test_every_kind_of_pixel_keeps_its_colour(mode: str, value: int, expected: tuple[int, ...]) -> None:
    assert opened(saved(Image.new(mode, (16, 16), value))).getpixel((3, 3)) == expected


def test_transparency_of_a_palette_is_kept() -> None:
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    palette.putpixel((2, 2), 0)
    picture = opened(saved(palette, transparency=0))
    assert picture.getpixel((2, 2))[3] == 0  # type: ignore[index]  # RGBA
    assert picture.getpixel((5, 5)) == (200, 10, 20, 255)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "key", "expected"),
    [
        (4, 0, b"\x5a" * 8, (5,), [(85, 85, 85, 0), (170, 170, 170, 255)]),
        (2, 0, b"\x66" * 4, (2,), [(85, 85, 85, 255), (170, 170, 170, 0)]),
        (16, 0, b"\x12\x34\x80\x40" * 8, (0x1234,), [(18, 18, 18, 0), (128, 128, 128, 255)]),
        (16, 2, b"\x12\x34" * 3 + b"\x80\x40" * 45, (0x1234,) * 3, [(18, 18, 18, 0), (128, 128, 128, 255)]),
    ],
    ids=["4-bit grey", "2-bit grey", "16-bit grey", "16-bit colour"],
)
def test_transparent_colour_is_found_at_every_depth(
    depth: int, colour: int, row: bytes, key: tuple[int, ...], expected: list[tuple[int, ...]]
) -> None:
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", 16, 16, depth, colour, 0, 0, 0)),
        (b"tRNS", struct.pack(f">{len(key)}H", *key)),
        (b"IDAT", zlib.compress((b"\0" + row) * 16)),
        (b"IEND", b""),
    ]
    file = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    picture = opened(file)
    assert [picture.getpixel((x, 3)) for x in (0, 1)] == expected


def test_inks_become_colours() -> None:
    red = opened(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.asarray(red, dtype=int) - (255, 0, 0)).max() <= 4


def test_large_pictures_are_made_smaller_in_proportion() -> None:
    assert opened(saved(Image.new("RGB", (4096, 512)))).size == (2048, 256)
    assert opened(saved(Image.new("RGB", (2000, 1000)))).size == (2000, 1000)


def test_nothing_but_pixels_passes_on(hostile_pictures: dict[str, bytes]) -> None:
    made = checked_image(hostile_pictures["polyglot"], max_pixels=MAX_PIXELS)
    assert made.endswith(b"IEND\xaeB`\x82")
    assert b"script" not in made


def test_base64_and_data_urls_are_read() -> None:
    text = base64.b64encode(b"picture").decode()
    assert decode_base64_image(text) == b"picture"
    assert decode_base64_image(f"data:image/png;base64,{text}") == b"picture"
    assert decode_base64_image(f"{text[:4]}\n{text[4:]}\n") == b"picture"


@pytest.mark.parametrize(
    "text", ["data:image/png,raw", "data:", "https://example.org/a.png", "not base64!", "abc", "é", "", "   "]
)
def test_what_is_no_base64_is_refused_by_its_field(text: str) -> None:
    with pytest.raises(InvalidImage, match="input_image"):
        decode_base64_image(text)
