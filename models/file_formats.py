"""The file formats, and the encoding of images. No torch: it runs beside the device thread."""

import json
from collections.abc import Mapping
from enum import StrEnum
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

# Pillow's documentation advises against JPEG quality above 95: files grow, with hardly any gain.
DEFAULT_LOSSY_QUALITY = 95

_EXIF_IFD = 0x8769
_EXIF_USER_COMMENT = 0x9286


class OutputFormat(StrEnum):
    PNG = "png"
    WEBP = "webp"
    JPEG = "jpeg"

    @property
    def content_type(self) -> str:
        return f"image/{self.value}"

    @property
    def is_lossy(self) -> bool:
        return self is not OutputFormat.PNG

    @property
    def has_alpha(self) -> bool:
        return self is not OutputFormat.JPEG


class MeshFormat(StrEnum):
    """The formats that `models.mesh.formats` writes."""

    GLB = "glb"
    OBJ = "obj"
    STL = "stl"
    PLY = "ply"

    @property
    def content_type(self) -> str:
        """The registered media type. PLY has none at IANA; `application/ply` is in common use."""
        return _MESH_CONTENT_TYPES[self]


_MESH_CONTENT_TYPES = {
    MeshFormat.GLB: "model/gltf-binary",
    MeshFormat.OBJ: "model/obj",
    MeshFormat.STL: "model/stl",
    MeshFormat.PLY: "application/ply",
}


def encode_image(
    pixels: NDArray[np.uint8],
    output_format: OutputFormat,
    *,
    metadata: Mapping[str, str] | None = None,
    quality: int | None = None,
) -> bytes:
    """Encode `pixels` `(height, width, 3)`, or 4 channels with alpha, which JPEG does not have.

    `quality`, 0 to 100, applies to WebP and JPEG. PNG stores `metadata` as one text chunk per key, WebP as JSON in
    ASCII in the EXIF user comment; JPEG stores none.
    """
    image = Image.fromarray(pixels)
    lossy_quality = DEFAULT_LOSSY_QUALITY if quality is None else quality
    file = BytesIO()
    match output_format:
        case OutputFormat.PNG:
            image.save(file, "PNG", pnginfo=_png_text(metadata or {}))
        case OutputFormat.WEBP:
            image.save(file, "WEBP", quality=lossy_quality, exif=_user_comment(metadata) if metadata else b"")
        case OutputFormat.JPEG:
            image.save(file, "JPEG", quality=lossy_quality)
    return file.getvalue()


def read_metadata(data: bytes) -> dict[str, str]:
    """The metadata that `encode_image` wrote into a PNG or WebP file; empty if there is none."""
    with Image.open(BytesIO(data)) as image:
        image.load()
        if image.format == "PNG":
            return {str(key): str(value) for key, value in image.info.items() if isinstance(value, str)}
        comment = image.getexif().get_ifd(_EXIF_IFD).get(_EXIF_USER_COMMENT)
    if not isinstance(comment, bytes):
        return {}
    return {str(key): str(value) for key, value in json.loads(comment[8:]).items()}


def _png_text(metadata: Mapping[str, str]) -> PngInfo:
    text = PngInfo()
    for key, value in metadata.items():
        # NUL ends a text chunk's fields. What Latin-1 cannot hold, Pillow writes as iTXt, in UTF-8.
        text.add_text(key, value.replace("\0", "\N{REPLACEMENT CHARACTER}"))
    return text


def _user_comment(metadata: Mapping[str, str]) -> bytes:
    """EXIF 2.3, section 4.6.5: the comment opens with its character code in eight bytes."""
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = b"ASCII\0\0\0" + json.dumps(dict(metadata)).encode("ascii")
    return exif.tobytes()
