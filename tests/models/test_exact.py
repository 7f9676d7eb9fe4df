"""Exact is exact: bit for bit the stock pipeline's result, in float32 and bfloat16, alone and in any company."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from models.curve import CurvePoint, Preset
from models.engine import Engine
from models.request import GenerationRequest, LatencyBudget, PresetBudget
from models.rules.router import RouterPolicy
from models.state import DenoiseState

Ask = Callable[..., GenerationRequest]
Fields = Callable[..., dict[str, Any]]
Denoise = Callable[..., DenoiseState]
StockResult = Callable[..., Any]

ROUTED = CurvePoint(RouterPolicy(0.3, 0.3, 2, width_bias=0.5), 0.5, 0.5, 0.5, 0.5)


class Pair(NamedTuple):
    """An engine, and the stock pipeline of its type."""

    engine: Engine
    stock: Any


PAIRS = {
    "routers": ("engine", "stock"),
    "no routers": ("plain_engine", "stock"),
    "bfloat16": ("bfloat16_engine", "bfloat16_stock"),
}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(*map(request.getfixturevalue, PAIRS[request.param]))


@pytest.mark.parametrize(
    "fields",
    [
        {"height": 64, "width": 96, "num_inference_steps": 3, "seed": 1},
        {"height": 112, "width": 80, "num_inference_steps": 5, "seed": 2, "prompt": ""},
        {"num_inference_steps": 1, "prompt": "a large blue square on the right"},
    ],
    ids=["wide", "tall", "one step"],
)
def test_exact_equals_the_stock_pipeline_bit_for_bit(
    pair: Pair, stock_result: StockResult, ask: Ask, denoise: Denoise, fields: dict[str, Any]
) -> None:
    request = ask(**fields)
    assert torch.equal(denoise(pair.engine, request).latents, stock_result(pair.stock, request, pair.engine))


def test_exact_equals_the_stock_pipeline_at_another_guidance_scale(
    pair: Pair, stock_result: StockResult, ask: Ask, denoise: Denoise, other_scale: Mapping[str, Any]
) -> None:
    request = ask(**other_scale)
    assert torch.equal(denoise(pair.engine, request).latents, stock_result(pair.stock, request, pair.engine))


@pytest.mark.parametrize(
    ("negative_prompt", "scale"), [("a green triangle", 1.5), ("", 4.0), (" ".join(["red"] * 30), 2.0)]
)
def test_exact_equals_the_stock_pipeline_with_true_guidance(
    pair: Pair,
    stock_result: StockResult,
    ask: Ask,
    guided: Fields,
    denoise: Denoise,
    negative_prompt: str,
    scale: float,
) -> None:
    request = ask(width=80, **guided(negative_prompt, scale))
    latents = denoise(pair.engine, request).latents
    assert torch.equal(latents, stock_result(pair.stock, request, pair.engine))
    assert not torch.allclose(latents, denoise(pair.engine, ask(width=80)).latents, atol=0.01)


@pytest.fixture
def bfloat16_pair(bfloat16_engine: Engine, bfloat16_stock: Any) -> Pair:
    return Pair(bfloat16_engine, bfloat16_stock)


@pytest.fixture(params=["pair of float32", "bfloat16_pair"])
def either(request: pytest.FixtureRequest, engine: Engine, stock: Any) -> Pair:
    return request.getfixturevalue("bfloat16_pair") if request.param == "bfloat16_pair" else Pair(engine, stock)


def test_companions_change_no_bit_of_an_exact_result(
    either: Pair, stock_result: StockResult, ask: Ask, guided: Fields, edited: Fields
) -> None:
    """Exact ones with and without guidance, and edits, step beside each other and beside elastic ones."""
    requests = [
        ask(seed=0),
        ask(seed=1, prompt="a large blue square on the right", **guided("red")),
        ask(seed=2, prompt="", num_inference_steps=6, **edited(0.7, 72, 88)),
        ask(seed=3, num_inference_steps=6, **edited(0.7, 72, 88, has_mask=True), **guided("", 3.0)),
    ]
    states = [either.engine.start(request) for request in requests]
    others = [
        either.engine.start(ask(seed=4, prompt="red", budget=PresetBudget(Preset.DRAFT))),
        either.engine.start(ask(seed=5, prompt="a green triangle", **guided("blue")), ROUTED),
        either.engine.start(ask(seed=6, budget=LatencyBudget(60.0))),
    ]
    while present := [state for state in (*others, *states) if not state.is_done]:
        either.engine.step(present)
    for request, state in zip(requests, states, strict=True):
        assert torch.equal(state.latents, stock_result(either.stock, request, either.engine))
        assert state.summary().exact_tolerance == 0
        assert state.summary().compute_ratio == 1
    assert [state.summary().exact_tolerance for state in others] == [None] * 3


@pytest.mark.parametrize(
    "kind",
    ["flux", "flux_kontext", "qwen_image", "qwen_image_edit", "qwen_image_edit_2511"],
    indirect=True,
    scope="session",
)
@pytest.mark.parametrize("has_guidance", [False, True], ids=["one branch", "two branches"])
def test_exact_picture_is_that_of_the_stock_pipeline(
    either: Pair, stock_result: StockResult, ask: Ask, guided: Fields, denoise: Denoise, has_guidance: bool
) -> None:
    request = ask(height=80, width=64, **guided() if has_guidance else {})
    expected = stock_result(either.stock, request, either.engine, "pil")[0]
    pixels = either.engine.finish(denoise(either.engine, request))
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (80, 64, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(expected))


def test_exact_states_have_calls_of_their_own(engine: Engine, ask: Ask, guided: Fields, monkeypatch: Any) -> None:
    """Those of the stock pipeline; all others share one call."""
    family = next(iter(engine._families.values()))
    calls: list[int] = []

    def epilogue(states: list[DenoiseState], streams: Any) -> Tensor:
        calls.append(len(streams.hidden_states))
        return type(family).epilogue(family, states, streams)

    monkeypatch.setattr(family, "epilogue", epilogue)
    exact = [engine.start(ask(**fields)) for fields in ({}, guided())]
    deadline = ask(budget=LatencyBudget(60.0))
    assert deadline.point.is_exact
    others = [engine.start(ask(), ROUTED), engine.start(deadline), engine.start(ask(**guided()), ROUTED)]
    keys = {state.batch_key for state in (*exact, *others)}
    assert len(keys) == 3
    report = engine.step([*exact, *others])
    assert calls == [4, 1, *([2] if family.joins_branches else [1, 1])]
    rows = sum(len(state.rows) for state in (*exact, *others))
    assert {block.num_run + block.num_skipped + block.num_reused for block in report.blocks} == {rows}
    assert [block.block for block in report.blocks] == [block.name for block in family.blocks]


def test_only_what_was_exact_at_every_step_is_exact(engine: Engine, ask: Ask) -> None:
    state = engine.start(ask())
    engine.step([state])
    assert state.is_exact
    state.move_to(ROUTED)
    engine.step([state])
    state.move_to(ask().point)
    assert not state.is_exact
    while not state.is_done:
        engine.step([state])
    assert state.summary().exact_tolerance is None
    assert state.summary().rule == "dense"


def test_images_of_a_series_and_a_request_begun_anew_equal_single_ones(
    bfloat16_engine: Engine, ask: Ask, guided: Fields, denoise: Denoise
) -> None:
    """n images are n requests, and a job whose worker died begins anew, maybe among others."""
    series = [ask(seed=seed, **guided()) for seed in (7, 8)]
    states = [bfloat16_engine.start(request) for request in series]
    lost = bfloat16_engine.start(series[0])
    bfloat16_engine.step([lost, *states])
    recovered = bfloat16_engine.start(series[0])
    while not (states[0].is_done and recovered.is_done):
        bfloat16_engine.step([state for state in (recovered, *states) if not state.is_done])
    for request, state in zip(series, states, strict=True):
        assert torch.equal(state.latents, denoise(bfloat16_engine, request).latents)
    assert torch.equal(recovered.latents, states[0].latents)
