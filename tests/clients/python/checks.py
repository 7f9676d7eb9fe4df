"""What the scripts of all Python clients share: the server they call, and how they tell what worked."""

import base64
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
from PIL import Image

PROMPT = "a red circle above a blue square"


@dataclass(frozen=True)
class Target:
    """Where the server is, and the input of edits: a picture, and a mask whose left half is to be edited."""

    base_url: str
    api_key: str
    picture: Path
    mask: Path


def target() -> Target:
    """The target that `tests/clients/conftest.py` put into the environment."""
    folder = Path(os.environ["CLIENTS_PICTURES"])
    return Target(
        os.environ["CLIENTS_BASE_URL"], os.environ["CLIENTS_API_KEY"], folder / "picture.png", folder / "mask.png"
    )


def run(checks: Mapping[str, Callable[[], None]]) -> None:
    """Run the check of each feature and print a JSON line for each. Exits with status 1 if one failed."""
    failed = False
    for feature, check in checks.items():
        problem = None
        try:
            check()
        except Exception as error:
            failed = True
            line = traceback.extract_tb(error.__traceback__)[-1]
            problem = f"{type(error).__name__}: {error} ({Path(line.filename).name}:{line.lineno})"
        print(json.dumps({"feature": feature, "problem": problem}), flush=True)
    sys.exit(failed)


def error_of(call: Callable[[], object]) -> Any:
    """The exception that `call` raises. Raises AssertionError if it raises none."""
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("the call was accepted")


def image_of(data: bytes) -> Image.Image:
    image = Image.open(BytesIO(data))
    image.load()
    return image


def image_of_base64(text: str | None) -> Image.Image:
    assert text is not None, "the answer has no b64_json"
    return image_of(base64.b64decode(text))


def image_behind(url: str | None) -> Image.Image:
    """The picture at a link, fetched without a key, as a browser does for <img>."""
    assert url is not None, "the answer has no url"
    answer = httpx2.get(url)
    assert answer.status_code == 200, f"{url} answers {answer.status_code}: {answer.text[:200]}"
    return image_of(answer.content)


def check_usage(usage: object) -> None:
    """`usage` is the object of OpenAI's SDK, or of one that copies it."""
    assert usage is not None, "the answer has no usage"
    numbers = [getattr(usage, name) for name in ("input_tokens", "output_tokens", "total_tokens")]
    assert min(numbers) > 0, f"usage is {numbers}"
    assert numbers[2] == numbers[0] + numbers[1], f"usage is {numbers}"


def check_only_left_half_changed(edited: Image.Image, original: Path) -> None:
    """Raises AssertionError unless the kept half is the original's to the last bit."""
    with Image.open(original) as image:
        before = image.convert("RGB")
    assert edited.size == before.size, f"the picture of {before.size} became {edited.size}"
    left, right = (mean_difference(edited, before, half) for half in (0, 1))
    assert right == 0, f"the half that was to be kept differs by {right:.1f} of 255"
    assert left > 3, f"the half that was to be edited differs by {left:.1f} of 255"


def check_transparent(image: Image.Image) -> None:
    """Some pixels are quite transparent, and some are quite opaque."""
    assert "A" in image.getbands(), f"the picture has no alpha, but {image.getbands()}"
    alpha = image.getchannel("A").getextrema()
    assert alpha == (0, 255), f"alpha is {alpha}"


def mean_difference(one: Image.Image, other: Image.Image, half: int) -> float:
    """Over all channels of the left (0) or the right half (1). A strip beside the border does not count."""
    width, height = one.size
    strip = width // 8
    box = (0, 0, width // 2 - strip, height) if half == 0 else (width // 2 + strip, 0, width, height)
    values = [image.convert("RGB").crop(box).tobytes() for image in (one, other)]
    return sum(abs(a - b) for a, b in zip(*values, strict=True)) / len(values[0])
