from io import BytesIO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from models.file_formats import OutputFormat, encode_image, read_metadata

METADATA = {"prompt": "ein roter Kreis über 青い四角 🟥", "seed": "7"}


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    """A smooth gradient, which lossy formats keep well."""
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    return np.stack(np.broadcast_arrays(ramp[:, None], ramp[None, :], np.uint8(90)), axis=-1)


@pytest.mark.parametrize("output_format", OutputFormat)
def test_file_has_the_format_and_the_size(output_format: OutputFormat, pixels: NDArray[np.uint8]) -> None:
    data = encode_image(pixels[:16], output_format)
    with Image.open(BytesIO(data)) as image:
        assert image.get_format_mimetype() == output_format.content_type
        assert image.size == (32, 16)


def test_png_keeps_every_pixel(pixels: NDArray[np.uint8]) -> None:
    with Image.open(BytesIO(encode_image(pixels, OutputFormat.PNG))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("output_format", [OutputFormat.WEBP, OutputFormat.JPEG])
def test_lossy_file_is_smaller_at_lower_quality_and_close_at_the_default(
    output_format: OutputFormat, pixels: NDArray[np.uint8]
) -> None:
    default = encode_image(pixels, output_format)
    assert len(encode_image(pixels, output_format, quality=5)) < len(default)
    with Image.open(BytesIO(default)) as image:
        assert np.abs(np.asarray(image).astype(int) - pixels).mean() < 4


@pytest.mark.parametrize("output_format", [OutputFormat.PNG, OutputFormat.WEBP])
def test_metadata_is_read_back(output_format: OutputFormat, pixels: NDArray[np.uint8]) -> None:
    assert read_metadata(encode_image(pixels, output_format, metadata=METADATA)) == METADATA
    assert read_metadata(encode_image(pixels, output_format)) == {}


def test_jpeg_carries_no_metadata(pixels: NDArray[np.uint8]) -> None:
    assert encode_image(pixels, OutputFormat.JPEG, metadata=METADATA) == encode_image(pixels, OutputFormat.JPEG)


@given(prompt=st.text(max_size=50))
def test_any_prompt_survives_in_webp_and_all_but_nul_in_png(prompt: str) -> None:
    pixels = np.zeros((2, 2, 3), np.uint8)
    metadata = {"prompt": prompt}
    assert read_metadata(encode_image(pixels, OutputFormat.WEBP, metadata=metadata)) == metadata
    without_nul = {"prompt": prompt.replace("\0", "\N{REPLACEMENT CHARACTER}")}
    assert read_metadata(encode_image(pixels, OutputFormat.PNG, metadata=metadata)) == without_nul
