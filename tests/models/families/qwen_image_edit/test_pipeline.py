"""What is the Qwen-Image-Edits' alone; see also `test_references.py` and the engine's tests."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models.card import PictureSizes
from models.engine import Engine
from models.errors import InvalidRequest, WeightsError
from models.families.qwen_image_edit.pipeline import PictureProcessor, QwenImageEditFamily
from models.load_options import DEFAULTS, LoadOptions, Offload
from models.request import ImageRequest
from models.state import DenoiseState
from models.weights import CheckpointTraits
from tests.fixtures.generation import edit_of
from tests.fixtures.kinds import Kind

Ask = Callable[..., ImageRequest]
Denoise = Callable[..., DenoiseState]
StockResult = Callable[..., Any]


def test_guided_edit_is_that_of_the_stock_pipeline(
    engine: Engine, stock: Any, stock_result: StockResult, ask: Ask, guided: Callable[..., Any], denoise: Denoise
) -> None:
    """Up to rounding: branches are two rows here and two calls there."""
    request = ask(**guided("a large blue square", 3.0))
    expected = stock_result(stock, request, engine)
    torch.testing.assert_close(denoise(engine, request).latents, expected, rtol=0, atol=1e-5)


def test_template_begins_with_the_tokens_that_the_pipeline_cuts_off(family: QwenImageEditFamily) -> None:
    start = family.pipeline.prompt_template_encode.split("<|vision_start|>")[0].split("{}")[0]
    assert len(family.pipeline.tokenizer(start).input_ids) == family.pipeline.prompt_template_encode_start_idx


@pytest.mark.parametrize("param", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_prompt_with_the_token_of_a_picture_is_refused(engine: Engine, ask: Ask, param: str, token: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{param} has .*, which stands for an input image") as error:
        engine.start(ask(guidance_scale=2.0, **{param: f"a {token} circle"}))
    assert error.value.param == param


@pytest.mark.parametrize("param", ["prompt", "negative_prompt"])
def test_prompt_with_too_many_tokens_is_refused(kind: Kind, engine: Engine, ask: Ask, param: str) -> None:
    limit = 35 if kind.directory == "tiny_qwen_image_edit" else 38  # whose template has no picture
    engine.start(ask(guidance_scale=2.0, **{param: " ".join(["red"] * limit)}))
    with pytest.raises(InvalidRequest, match=f"{param} has {limit + 1} tokens; {kind.model} reads at most {limit}"):
        engine.start(ask(guidance_scale=2.0, **{param: " ".join(["red"] * (limit + 1))}))


@pytest.mark.parametrize("size", [(2000, 19), (10, 1001)])
def test_picture_that_is_too_narrow_is_refused(engine: Engine, ask: Ask, size: tuple[int, int]) -> None:
    """Qwen2.5-VL can't read it."""
    with pytest.raises(InvalidRequest, match=f"image has {size[0]}x{size[1]} pixels; .* at most 100 times"):
        engine.start(ask(edit=edit_of(size)))


@pytest.mark.parametrize("size", [(2048, 21), (10, 1000)])
def test_narrowest_picture_can_be_read(
    family: QwenImageEditFamily, small_pictures: Mapping[tuple[Any, str], Any], size: tuple[int, int]
) -> None:
    areas = [area for (_, name), area in small_pictures.items() if name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE")]
    assert areas == [1024**2, 384**2]
    for area in areas:
        read = Image.new("RGB", PictureSizes(area=area).of(*size))
        assert min(read.size) >= family.pixels_per_token
        family.pipeline.processor.image_processor(read)


def test_directory_without_a_processor_is_refused(kind: Kind, directory: Path, tmp_path: Path) -> None:
    incomplete = Path(shutil.copytree(directory, tmp_path / kind.model))
    shutil.rmtree(incomplete / "processor")
    with pytest.raises(WeightsError, match=f"{kind.model} can't be loaded"):
        kind.family.load(incomplete, "cpu", torch.float32, None, CheckpointTraits(), DEFAULTS)


def test_processor_may_have_the_layout_of_the_published_ones(directory: Path, tmp_path: Path) -> None:
    """A file of its own for each part, one of them for videos, and a template of chats."""
    folder = Path(shutil.copytree(directory / "processor", tmp_path / "processor"))
    nested = folder / "processor_config.json"
    content = json.loads(nested.read_text())["image_processor"] | {"processor_class": "Qwen2_5_VLProcessor"}
    nested.unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    inputs = {"text": ["<|image_pad|> red"], "images": [Image.new("RGB", (80, 60), "red")], "return_tensors": "pt"}
    ours, expected = (PictureProcessor.from_pretrained(path)(**inputs) for path in (folder, directory / "processor"))
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_text_encoder_stays_on_the_host_if_asked(kind: Kind, directory: Path) -> None:
    # The meta device stands for an accelerator.
    family: Any = kind.family.load(
        directory, "meta", torch.float32, None, CheckpointTraits(), LoadOptions(Offload.TEXT_ENCODERS)
    )
    devices = {name: getattr(family.pipeline, name).device.type for name in ("text_encoder", "transformer", "vae")}
    assert devices == {"text_encoder": "cpu", "transformer": "meta", "vae": "meta"}


@pytest.mark.parametrize("kind", ["qwen_image_edit_plus"], indirect=True, scope="session")
def test_several_pictures_are_read_in_their_order(
    engine: Engine, stock: Any, stock_result: StockResult, ask: Ask, denoise: Denoise
) -> None:
    edit = edit_of((50, 70), (64, 30), (90, 90))
    request, other = (ask(edit=replace(edit, images=images)) for images in (edit.images, edit.images[::-1]))
    latents = denoise(engine, request).latents
    assert torch.equal(latents, stock_result(stock, request, engine))
    assert not torch.allclose(latents, denoise(engine, other).latents, atol=0.01)
