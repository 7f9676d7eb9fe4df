"""Settings for all tests, and pictures that nobody should send."""

import random
import shutil
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from benchmarks.processes import RedisServer

# Same examples in every run, and no deadline: on a busy machine a single one may take a second.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("repeatable")

_NUM_MUTATIONS = 180


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis that all tests share."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture(scope="session")
def hostile_pictures() -> dict[str, bytes]:
    """Files by name: broken, huge, of other kinds, and odd but honest ones among them."""
    return {**_crafted(), **_mutated()}


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"", extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [_chunk(b"IHDR", header), extra, _chunk(b"IDAT", zlib.compress(rows)), _chunk(b"IEND", b"")]
    )


def _saved(picture: Image.Image, file_format: str, **options: Any) -> bytes:
    file = BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def _exif_bomb(num_entries: int, size_bytes: int) -> bytes:
    """As many tags, each of which claims the same `size_bytes`."""
    entries = b"".join(struct.pack("<HHII", 0x1000 + index, 1, size_bytes, 8) for index in range(num_entries))
    directory = b"II*\0" + struct.pack("<IH", 8, num_entries) + entries + bytes(4)
    return directory.ljust(size_bytes + 8, b"\0")


def _webp_canvas(width: int, height: int) -> bytes:
    """A small picture on a canvas that is said to be large."""
    inner = _saved(Image.new("RGB", (16, 16)), "WEBP", lossless=True)[12:]
    sides = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + sides + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _crafted() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (64, 48, 3), dtype=np.uint8))
    rgba = rgb.copy()
    rgba.putalpha(128)
    turned = Image.Exif()
    turned[0x112] = 6
    black = b"".join(b"\0" + bytes(96) for _ in range(32))
    progressive = _saved(rgb, "JPEG", progressive=True)
    last_scan = progressive.rindex(b"\xff\xda")
    zeros = zlib.compress(bytes(50_000_000))
    jpeg = _saved(rgb, "JPEG")
    # Turned, and with a text that is a fraction: Pillow can read it, and fails to write it again.
    tags = struct.pack("<HHHIIHHIII", 2, 0x10F, 5, 1, 38, 0x112, 3, 1, 6, 0)
    text_as_fraction = b"II*\0" + struct.pack("<I", 8) + tags + struct.pack("<II", 72, 1)
    return {
        "palette with alpha": _saved(rgb.convert("P"), "PNG", transparency=0),
        "16-bit grey": _saved(Image.fromarray(rng.integers(0, 65535, (32, 32)).astype(np.uint16)), "PNG"),
        "16-bit colour": _png(32, 32, 16, 2, b"".join(b"\0" + bytes(192) for _ in range(32))),
        "grey with alpha": _saved(rgba.convert("LA"), "PNG"),
        "1 bit": _saved(rgb.convert("1"), "PNG"),
        "cmyk": _saved(rgb.convert("CMYK"), "JPEG"),
        "turned": _saved(rgb, "JPEG", exif=turned),
        "phone's two pictures": _saved(rgb, "MPO", save_all=True, append_images=[rgb]),
        "polyglot": _saved(rgba, "PNG") + b"PK\x03\x04<script>",
        "broken exif": _png(32, 32, rows=black, extra=_chunk(b"eXIf", b"garbage")),
        "50,000 pixels a side": _png(50_000, 50_000),
        "2^31 pixels a side": _png(2**31 - 1, 2**31 - 1),
        "50,000 of one": _png(50_000, 8),
        "no pixels": _png(0, 0),
        "one pixel": _png(1, 1, 8, 0, b"\0\0"),
        "webp canvas": _webp_canvas(16_383, 16_383),
        "animated png": _saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(180)]),
        "animated webp": _saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(180)]),
        "gif": _saved(rgb, "GIF"),
        "tiff": _saved(rgb, "TIFF"),
        "bmp": _saved(rgb, "BMP"),
        "profile bomb": _png(32, 32, rows=black, extra=_chunk(b"iCCP", b"x\0\0" + zeros)),
        "text bomb": _png(32, 32, rows=black, extra=_chunk(b"zTXt", b"x\0\0" + zeros)),
        "pixel bomb": _png(32, 32, rows=bytes(50_000_000)),
        "scan bomb": progressive[:-2] + progressive[last_scan:-2] * 500,
        "many segments": jpeg[:2] + _segment(0xE5, b"") * 500_000 + jpeg[2:],
        "exif in pieces": jpeg[:2] + _segment(0xE1, b"Exif\0\0" + bytes(6)) * 100_000 + jpeg[2:],
        "fill bytes": jpeg[:2] + b"\xff" * 3_000_000 + jpeg[2:],
        "unknown segments": jpeg[:2] + _segment(0xF0, bytes(60_000)) * 100 + jpeg[2:],
        "many chunks": _png(32, 32, rows=black, extra=_chunk(b"prVt", b"") * 200_000),
        "many pieces of pixels": _png(32, 32, rows=black, extra=_chunk(b"IDAT", b"") * 200_000),
        "palette before size": _png(32, 32)[:8] + _chunk(b"PLTE", bytes(12)) + _png(32, 32, 4, 0)[8:],
        "exif bomb": _png(32, 32, rows=black, extra=_chunk(b"eXIf", _exif_bomb(300, 1_000_000))),
        "index bomb": jpeg[:2] + _segment(0xE2, b"MPF\0" + _exif_bomb(4000, 60_000)) + jpeg[2:],
        "exif that can't be written": _saved(rgb, "JPEG", exif=b"Exif\0\0" + text_as_fraction),
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "html": b"<html>",
        "header alone": b"\x89PNG\r\n\x1a\n",
        "cut off": _saved(rgb, "PNG")[:-40],
        "jpeg cut off": _saved(rgb, "JPEG")[:-60],
        "webp cut off": _saved(rgb, "WEBP")[:-30],
        "long and thin": _png(16_384, 16, 8, 0, bytes(16_385 * 16)),
    }


def _mutated() -> dict[str, bytes]:
    """Changed, cut and grown files; some PNGs with their checksums made right again, so that they are read further."""
    rng = random.Random(0)
    crafted = _crafted()
    bases = [
        crafted[name] for name in ("palette with alpha", "16-bit grey", "cmyk", "turned", "animated webp", "polyglot")
    ]
    files = {}
    for number in range(_NUM_MUTATIONS):
        data = bytearray(rng.choice(bases))
        for _ in range(rng.choice((1, 2, 8))):
            place = rng.randrange(min(len(data), rng.choice((64, 400, len(data)))))
            match rng.randrange(3):
                case 0:
                    data[place] = rng.randrange(256)
                case 1:
                    del data[place : place + rng.randrange(1, 30)]
                case _:
                    data[place:place] = rng.randbytes(rng.randrange(1, 30))
        files[f"mutation {number}"] = _with_checksums(data) if number % 3 == 0 else bytes(data)
    return files


def _with_checksums(data: bytearray) -> bytes:
    if data[:4] != b"\x89PNG":
        return bytes(data)
    parts, place = [bytes(data[:8])], 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4])
        if place + 12 + length > len(data):
            break
        parts.append(_chunk(bytes(data[place + 4 : place + 8]), bytes(data[place + 8 : place + 8 + length])))
        place += 12 + length
    return b"".join(parts) + bytes(data[place:])
