from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from models.budget import resolve
from models.card import Guidance, ImageCard, SizeLimits
from models.curve import EXACT, ComputedSteps, Preset
from models.errors import InvalidRequest
from models.file_formats import OutputFormat
from models.request import Budget, ImageRequest, PresetBudget, QualityBudget
from service.api.parsing import parse_image_body
from service.api.schemas import ImageBody
from service.api.sizes import nearest_size
from service.budget import BudgetBody
from service.order import Order, Output, QualityLevel

DEFAULT = QualityBudget(0.9)
DEFAULT_BODY = BudgetBody(quality=0.9, min_quality=0.7)


def order(card: ImageCard, **fields: Any) -> Order:
    body = ImageBody.model_validate({"prompt": "a red circle", **fields})
    return parse_image_body(body, card, default_budget=DEFAULT_BODY, random_seed=77)


def parse(card: ImageCard, **fields: Any) -> tuple[ImageRequest, ...]:
    requests = order(card, **fields).requests
    assert all(isinstance(request, ImageRequest) for request in requests)
    return requests  # type: ignore[return-value]  # asserted above


def test_defaults_are_the_models_and_the_servers(drawn_card: ImageCard) -> None:
    expected = ImageRequest(
        model="drawn",
        prompt="a red circle",
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=3.5,
        seed=77,
        budget=DEFAULT,
        point=resolve(DEFAULT, drawn_card.curve),
        is_guided=False,
    )
    assert parse(drawn_card) == (expected,)


@pytest.mark.parametrize(
    ("fields", "steps", "is_calibrated"),
    [
        ({}, ComputedSteps(4, 8), True),
        ({"guidance_scale": 6}, ComputedSteps(4, 8), True),
        ({"guidance_scale": 9}, ComputedSteps(5, 8), False),
        ({"size": "128x64"}, ComputedSteps(5, 8), False),
        ({"num_inference_steps": 20}, ComputedSteps(5, 20), False),
        ({"num_inference_steps": 4}, None, True),
    ],
)
def test_budget_is_resolved_for_the_requests_own_steps(
    fields: dict[str, Any], steps: ComputedSteps | None, is_calibrated: bool, forecasting_card: ImageCard
) -> None:
    (request,) = parse(forecasting_card, budget={"preset": "balanced"}, **fields)
    assert (request.point.steps, request.point.is_calibrated) == (steps, is_calibrated)


def test_pictures_have_consecutive_seeds(drawn_card: ImageCard) -> None:
    assert [request.seed for request in parse(drawn_card, n=3, seed=2**63 - 3)] == [2**63 - 3, 2**63 - 2, 2**63 - 1]


@pytest.mark.parametrize(
    ("fields", "size"),
    [
        ({}, (64, 64)),
        ({"size": "auto"}, (64, 64)),
        ({"size": "96x128"}, (96, 128)),
        ({"width": 96, "height": 128}, (96, 128)),
        ({"width": 96, "height": 128, "size": "96x128"}, (96, 128)),
    ],
)
def test_size_has_two_forms(fields: dict[str, Any], size: tuple[int, int], drawn_card: ImageCard) -> None:
    (request,) = parse(drawn_card, **fields)
    assert (request.width, request.height) == size


@pytest.mark.parametrize(
    ("word", "budget"),
    [
        ("low", PresetBudget(Preset.DRAFT)),
        ("medium", PresetBudget(Preset.FAST)),
        ("high", PresetBudget(Preset.HIGH)),
        ("xhigh", PresetBudget(Preset.EXACT)),
        ("max", PresetBudget(Preset.EXACT)),
        ("hd", PresetBudget(Preset.EXACT)),
        ("auto", DEFAULT),
        ("standard", DEFAULT),
    ],
)
def test_openai_words_are_budgets(word: str, budget: Budget, drawn_card: ImageCard) -> None:
    assert parse(drawn_card, quality=word)[0].budget == budget


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"width": 64, "height": 1000}, "height 1000 is not a multiple of 16; try 992", "height"),
        ({"size": "1000x64"}, "width 1000 is not a multiple of 16; try 992", "size"),
        ({"size": "2000x64"}, "width 2000 is not within 32 to 1024; try 1024", "size"),
        ({"width": -5, "height": 64}, "width -5 is not within 32 to 1024; try 32", "width"),
        ({"size": "64 x 64"}, "size '64 x 64' is not WIDTHxHEIGHT in pixels or auto, such as 64x64", "size"),
        ({"size": "64x96", "width": 96, "height": 64}, "disagree", "size"),
        ({"size": "auto", "width": 96, "height": 64}, "disagree", "size"),
        ({"width": 96}, "height is missing", "height"),
        ({"height": 96}, "width is missing", "width"),
        ({"num_inference_steps": 51}, "above the limit of drawn; try 50", "num_inference_steps"),
        ({"n": 2, "seed": 2**63 - 1}, f"try {2**63 - 2}", "seed"),
        ({"prompt": "x" * 201}, "has 201 characters; drawn takes at most 200", "prompt"),
        ({"negative_prompt": "blue"}, "negative_prompt 'blue' cannot be used here", "negative_prompt"),
        ({"negative_prompt": "blue"}, "set true_cfg_scale above 1, not 1", "negative_prompt"),
        ({"true_cfg_scale": 2}, "needs a negative_prompt", "negative_prompt"),
        ({"negative_prompt": "x" * 201, "true_cfg_scale": 2}, "at most 200", "negative_prompt"),
        ({"quality": "low", "budget": {"quality": 0.5}}, "quality 'low' and budget say the same thing", "quality"),
        ({"num_inference_steps": 4, "steps": 5}, "num_inference_steps 4 and steps 5", "steps"),
        ({"guidance_scale": 3, "cfg": 5}, "guidance_scale 3.0 and cfg 5.0", "cfg"),
        ({"steps": 51}, "above the limit of drawn; try 50", "num_inference_steps"),
        ({"background": "transparent"}, "this server has no background remover", "background"),
        ({"background": "transparent", "output_format": "jpeg"}, "not possible in jpeg files; try", "background"),
        ({"output_compression": 50}, "output_compression 50 applies to webp and jpeg", "output_compression"),
        ({"output_compression": 50}, "output_format is png, which is lossless; try 100", "output_compression"),
    ],
)
def test_refusal_names_the_nearest_valid_value(
    fields: dict[str, Any], message: str, param: str, drawn_card: ImageCard
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(drawn_card, **fields)
    assert message in str(caught.value)
    assert caught.value.param == param


@pytest.mark.parametrize("guidance", [Guidance.DISTILLED, Guidance.NONE])
def test_true_guidance_is_a_scale_of_its_own_where_guidance_scale_is_not_true(
    guidance: Guidance, drawn_card: ImageCard
) -> None:
    card = replace(drawn_card, guidance=guidance)
    (request,) = parse(card, guidance_scale=0.5, negative_prompt="", true_cfg_scale=2)
    assert (request.guidance_scale, request.negative_prompt, request.true_cfg_scale) == (0.5, "", 2.0)


@pytest.mark.parametrize(
    ("fields", "guidance_scale", "negative_prompt"),
    [
        ({}, 3.5, None),
        ({"negative_prompt": None, "true_cfg_scale": None}, 3.5, None),
        ({"negative_prompt": "blue"}, 3.5, "blue"),
        ({"negative_prompt": "", "guidance_scale": 1.1}, 1.1, ""),
        ({"negative_prompt": "", "guidance_scale": 0.5}, 0.5, None),
        ({"guidance_scale": 1}, 1.0, None),
        ({"guidance_scale": 0}, 0.0, None),
    ],
)
def test_negative_prompt_goes_with_guidance_scale_where_that_is_true(
    fields: dict[str, Any], guidance_scale: float, negative_prompt: str | None, guided_card: ImageCard
) -> None:
    (request,) = parse(guided_card, **fields)
    assert (request.guidance_scale, request.negative_prompt) == (guidance_scale, negative_prompt)
    assert request.true_cfg_scale == 1


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"negative_prompt": "blue", "guidance_scale": 1}, "set guidance_scale above 1, not 1", "negative_prompt"),
        ({"negative_prompt": "x" * 201}, "has 201 characters; guided takes at most 200", "negative_prompt"),
        (
            {"negative_prompt": "blue", "true_cfg_scale": 2},
            "true_cfg_scale 2 cannot be used here: guidance_scale is the true classifier-free guidance of guided",
            "true_cfg_scale",
        ),
        ({"true_cfg_scale": 1}, "omit true_cfg_scale", "true_cfg_scale"),
    ],
)
def test_refusal_where_guidance_scale_is_true_says_what_to_set(
    fields: dict[str, Any], message: str, param: str, guided_card: ImageCard
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(guided_card, **fields)
    assert message in str(caught.value)
    assert caught.value.param == param


def test_empty_negative_prompt_is_none_where_guidance_is_off(drawn_card: ImageCard) -> None:
    (request,) = parse(drawn_card, negative_prompt="")
    assert request == parse(drawn_card)[0]


def test_other_words_of_front_ends_mean_the_same(drawn_card: ImageCard) -> None:
    ours = parse(drawn_card, num_inference_steps=7, guidance_scale=2.5)
    assert parse(drawn_card, steps=7, cfg=2.5) == ours
    assert parse(drawn_card, steps=7, cfg=2.5, num_inference_steps=7, guidance_scale=2.5) == ours


def test_negative_prompt_needs_the_default_guidance_to_be_on(guided_card: ImageCard) -> None:
    with pytest.raises(InvalidRequest, match="set guidance_scale above 1, not 1"):
        parse(replace(guided_card, default_guidance_scale=1.0), negative_prompt="blue")


def test_preset_must_be_on_the_models_curve(drawn_card: ImageCard) -> None:
    with pytest.raises(InvalidRequest, match="offers: exact"):
        parse(replace(drawn_card, curve=(EXACT,)), budget={"preset": "fast"})


def test_output_follows_the_format(drawn_card: ImageCard) -> None:
    level = QualityLevel.MEDIUM
    assert order(drawn_card).output == Output(quality_level=level)
    fields = {"output_format": "webp", "output_compression": 40, "metadata": False}
    assert order(drawn_card, **fields).output == Output(OutputFormat.WEBP, 40, has_metadata=False, quality_level=level)
    assert order(drawn_card, output_compression=100).output == Output(quality_level=level)


@pytest.mark.parametrize(
    ("fields", "level"),
    [
        ({"quality": "low"}, "low"),
        ({"quality": "xhigh"}, "xhigh"),
        ({"quality": "max"}, "max"),
        ({"quality": "hd"}, "max"),
        ({"quality": "auto"}, "medium"),
        ({"budget": {"preset": "draft"}}, "low"),
        ({"budget": {"preset": "high"}}, "high"),
        ({"budget": {"quality": 0.97}}, "high"),
        ({"budget": {"compute_ratio": 0.45}}, "low"),
        ({"budget": {"quality": 1}}, "max"),
        ({"budget": {"latency_ms": 1000}}, None),
    ],
)
def test_budget_has_a_level_in_openais_words(fields: dict[str, Any], level: str | None, drawn_card: ImageCard) -> None:
    assert order(drawn_card, **fields).output.quality_level == level


def test_binary_answers_one_image(drawn_card: ImageCard) -> None:
    with pytest.raises(InvalidRequest, match="not n = 2"):
        order(drawn_card, n=2, response_format="binary")


@pytest.mark.parametrize(
    ("budget", "quality"), [({"quality": 0.3}, 0.3), ({"preset": "fast"}, 0.8), ({"compute_ratio": 0.3}, None)]
)
def test_quality_requested_is_the_one_that_the_budget_names(
    budget: dict[str, Any], quality: float | None, drawn_card: ImageCard
) -> None:
    assert order(drawn_card, budget=budget).quality_requested == quality


@pytest.mark.parametrize(
    ("fields", "min_quality"),
    [
        ({}, 0.7),
        ({"quality": "auto"}, 0.7),
        ({"quality": "high"}, None),
        ({"quality": "medium"}, None),
        ({"budget": {"quality": 0.9}}, None),
        ({"budget": {"quality": 0.9, "min_quality": 0.4}}, 0.4),
    ],
)
def test_load_may_lower_a_quality_only_where_the_budget_in_use_says_so(
    fields: dict[str, Any], min_quality: float | None, drawn_card: ImageCard
) -> None:
    assert order(drawn_card, **fields).min_quality == min_quality


@pytest.mark.parametrize(
    ("fields", "num_branches"),
    [({}, 1), ({"true_cfg_scale": 1.0}, 1), ({"true_cfg_scale": 1.5, "negative_prompt": ""}, 2)],
)
def test_true_guidance_adds_a_branch(fields: dict[str, Any], num_branches: int, drawn_card: ImageCard) -> None:
    assert order(drawn_card, **fields).num_branches == num_branches


@pytest.mark.parametrize(("scale", "num_branches"), [(0.5, 1), (1.0, 1), (1.1, 2), (4.0, 2)])
def test_guidance_scale_is_true_guidance_where_the_model_says_so(
    scale: float, num_branches: int, guided_card: ImageCard
) -> None:
    assert order(guided_card, guidance_scale=scale).num_branches == num_branches


@given(
    pixels=st.integers(-100, 5000),
    sizes=st.builds(SizeLimits, st.integers(1, 64), st.integers(64, 300), st.integers(400, 3000)),
)
def test_nearest_size_is_valid_and_nothing_valid_is_nearer(pixels: int, sizes: SizeLimits) -> None:
    valid = [side for side in range(sizes.minimum, sizes.maximum + 1) if side % sizes.multiple_of == 0]
    assert nearest_size(pixels, sizes) == min(valid, key=lambda side: (abs(side - pixels), side))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(width=st.integers(0, 99999), height=st.integers(0, 99999))
def test_any_size_is_taken_or_refused_with_one_that_is_taken(width: int, height: int, drawn_card: ImageCard) -> None:
    size = (width, height)
    for _ in range(3):
        try:
            (request,) = parse(drawn_card, size="{}x{}".format(*size))
        except InvalidRequest as error:
            name, nearest = str(error).split()[0], int(str(error).split()[-1])
            size = (nearest, size[1]) if name == "width" else (size[0], nearest)
        else:
            assert (request.width, request.height) == size
            return
    pytest.fail("the nearest valid sizes were refused")


@pytest.mark.parametrize("character", ["\n", "\t", " ", "\0", "\x7f", "é", "\u2028"])
def test_webhook_url_has_the_characters_of_a_url(character: str) -> None:
    url = "https://hooks.example/a"
    assert ImageBody(prompt="a", webhook_url=url).webhook_url == url
    for wrong in (url + character, character + url, url.replace("/a", f"/{character}a")):
        with pytest.raises(ValidationError, match="percent-encode"):
            ImageBody(prompt="a", webhook_url=wrong)
