"""What the families made for editing do with pictures; that exact is exact is tested with all families."""

from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from models.card import Edits, ImageCard, ModelCard
from models.curve import EXACT
from models.engine import Engine
from models.families.image import ImageFamily
from models.families.references import EditingFamily
from models.request import ImageEdit, ImageRequest
from models.state import DenoiseState
from tests.fixtures.generation import edit_of
from tests.fixtures.kinds import Kind

Ask = Callable[..., ImageRequest]
Denoise = Callable[..., DenoiseState]
StockResult = Callable[..., Any]


@pytest.fixture(scope="session", params=["flux_kontext", "qwen_image_edit", "qwen_image_edit_plus"])
def kind(kind: Any) -> Any:
    """The families made for editing."""
    return kind


@pytest.mark.parametrize("size", [(64, 64), (31, 200), (300, 90), (16, 17)])
def test_exact_equals_the_stock_pipeline_for_pictures_of_any_size(
    engine: Engine, stock: Any, stock_result: StockResult, ask: Ask, denoise: Denoise, size: tuple[int, int]
) -> None:
    request = ask(edit=edit_of(size, seed=3), width=80, num_inference_steps=2)
    expected = stock_result(stock, request, engine)
    assert torch.equal(denoise(engine, request).latents, expected)


@pytest.fixture
def published_sizes(small_pictures: Mapping[tuple[Any, str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are read at the sizes of the published models."""
    for (module, name), value in small_pictures.items():
        monkeypatch.setattr(module, name, value)


class Chosen(Exception):
    """Ends a stock pipeline when it has chosen the size at which it reads a picture."""


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(16, 2048), height=st.integers(16, 2048))
def test_pictures_are_read_at_the_sizes_that_the_stock_pipeline_chooses(
    published_sizes: None, family: EditingFamily, stock: Any, width: int, height: int
) -> None:
    def choose(image: Any, height: int, width: int) -> None:
        raise Chosen(width, height)

    picture = Image.new("RGB", (width, height))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stock.image_processor, "preprocess", choose)
        with pytest.raises(Chosen) as chosen:
            stock(prompt="red", image=picture)
    assert family.picture_sizes.of(width, height) == chosen.value.args


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux_kontext"], indirect=True, scope="session")
def test_exact_equals_the_stock_pipeline_at_the_published_sizes(
    published_sizes: None, engine: Engine, stock: Any, stock_result: StockResult, ask: Ask, denoise: Denoise
) -> None:
    request = ask(edit=edit_of((75, 60)), num_inference_steps=1)
    assert torch.equal(denoise(engine, request).latents, stock_result(stock, request, engine))
    references = engine.start(request).inputs[0].references
    assert references is not None
    assert references.sizes == ((880 // 16, 1184 // 16),)


def test_picture_changes_the_result(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    results = [denoise(engine, ask(edit=edit_of((50, 70), seed=seed))).latents for seed in (0, 1)]
    assert not torch.allclose(results[0], results[1], atol=0.01)


def test_transparent_parts_of_a_picture_are_white(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    red = Image.new("RGBA", (40, 40), (200, 0, 0, 255))
    red.paste((0, 0, 0, 0), (0, 0, 40, 20))
    white = Image.new("RGB", (40, 40), "white")
    white.paste((200, 0, 0), (0, 20, 40, 40))
    results = []
    for picture in (red, white):
        file = BytesIO()
        picture.save(file, "PNG")
        results.append(denoise(engine, ask(edit=ImageEdit((file.getvalue(),)), num_inference_steps=1)).latents)
    assert torch.equal(*results)


def test_only_requests_whose_pictures_have_as_many_tokens_share_a_batch(family: ImageFamily, ask: Ask) -> None:
    keys = [
        family.start(ask(edit=edit_of(size, seed=seed)), (EXACT,), EXACT).shape
        for seed, size in enumerate([(60, 60), (30, 30), (30, 90)])
    ]
    assert keys[0] == keys[1] != keys[2]


def test_branches_share_the_latents_of_the_pictures(
    family: ImageFamily, ask: Ask, guided: Callable[..., dict[str, Any]]
) -> None:
    cond, uncond = family.start(ask(**guided()), (EXACT,), EXACT).inputs
    assert cond.references is not None
    assert cond.references is uncond.references


def test_card_says_how_the_model_edits(kind: Kind, engine: Engine) -> None:
    card = engine.cards[kind.model]
    assert isinstance(card, ImageCard)
    assert card.edits is Edits.REFERENCE
    assert (card.family, card.max_input_images, card.needs_input_image) == {
        "tiny-flux-kontext": ("flux_kontext", 1, False),
        "tiny-qwen-image-edit": ("qwen_image_edit", 1, True),
        "tiny-qwen-image-edit-plus": ("qwen_image_edit_plus", 3, True),
    }[kind.model]


def test_example_that_is_measured_has_a_picture(family: ImageFamily, engine: Engine) -> None:
    card: ModelCard = engine.cards[family.model_id]
    [inputs, *_] = family.start(family.example_request(card), (EXACT,), EXACT).inputs
    assert inputs.references is not None
