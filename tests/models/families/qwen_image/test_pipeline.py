"""What is Qwen-Image's alone; what every family does is tested one folder up, and in the engine's tests."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline
from torch import Tensor, nn

import models.zoo
from models.card import Guidance, ImageCard, SizeLimits
from models.curve import EXACT, CurvePoint
from models.engine import Engine
from models.errors import InvalidRequest
from models.families.qwen_image import adapter
from models.families.qwen_image.pipeline import QwenImageFamily, pad_prompts, set_activation
from models.load_options import DEFAULTS
from models.request import ImageRequest
from models.rules.router import RouterPolicy
from models.state import DenoiseState
from models.weights import CheckpointTraits, MlpActivation
from models.zoo import load_engine
from tests.fixtures.engines import write_manifest
from tests.fixtures.kinds import Kind

MODEL = "tiny-qwen-image"
TEMPLATE_END = 5  # tokens
LONGEST = " ".join(["red"] * 35)
REUSING = CurvePoint(RouterPolicy(0.0, 1.0, 2, width_bias=-1e6), 0.5, 0.5, 0.5, 0.5)
"""Every block runs in every third step and is used again in between."""

Ask = Callable[..., ImageRequest]
Denoise = Callable[..., DenoiseState]
StockResult = Callable[..., Any]


def load(directory: Path, traits: CheckpointTraits) -> QwenImageFamily:
    return QwenImageFamily.load(directory, "cpu", torch.float32, None, traits, DEFAULTS)


# Prompts


def test_prompts_of_one_length_are_not_padded() -> None:
    contexts = [torch.randn(1, 3, 4) for _ in range(2)]
    batch, mask = pad_prompts(contexts)
    assert torch.equal(batch, torch.cat(contexts))
    assert mask is None


def test_shorter_prompts_are_padded_to_the_longest_and_masked() -> None:
    lengths = [2, 5, 1]
    contexts = [torch.randn(1, length, 4) for length in lengths]
    batch, mask = pad_prompts(contexts)
    assert batch.shape == (3, 5, 4)
    assert mask is not None
    assert mask.tolist() == [[i < length for i in range(5)] for length in lengths]
    for row, context, length in zip(batch, contexts, lengths, strict=True):
        assert torch.equal(row[:length], context[0])
        assert (row[length:] == 0).all()


def test_template_begins_with_the_tokens_that_the_pipeline_cuts_off(family: QwenImageFamily) -> None:
    start, end = family.pipeline.prompt_template_encode.split("{}")
    assert len(family.pipeline.tokenizer(start).input_ids) == 34
    assert len(family.pipeline.tokenizer(end).input_ids) == TEMPLATE_END


@pytest.mark.parametrize(("prompt", "count"), [("", 0), ("red", 1), ("a small red circle", 4), (LONGEST, 35)])
def test_row_counts_its_prompt_and_the_end_of_the_template(
    family: QwenImageFamily, ask: Ask, prompt: str, count: int
) -> None:
    state = family.start(ask(prompt=prompt), (EXACT,), EXACT)
    assert state.inputs[0].num_text_tokens == count + TEMPLATE_END


@pytest.mark.parametrize("param", ["prompt", "negative_prompt"])
def test_prompt_with_too_many_tokens_is_refused(engine: Engine, ask: Ask, param: str) -> None:
    engine.start(ask(guidance_scale=2.0, **{param: LONGEST}))
    with pytest.raises(InvalidRequest, match=f"{param} has 37 tokens; {MODEL} reads at most 35") as error:
        engine.start(ask(guidance_scale=2.0, **{param: LONGEST + " red red"}))
    assert error.value.param == param


def test_words_that_look_like_the_template_are_a_prompt_all_the_same(
    engine: Engine, stock: QwenImagePipeline, stock_result: StockResult, ask: Ask, denoise: Denoise
) -> None:
    request = ask(prompt="{} a <|im_end|> {red} circle", num_inference_steps=1)
    expected = stock_result(stock, request, engine)
    assert torch.equal(denoise(engine, request).latents, expected)


# Guidance


@pytest.mark.parametrize(("scale", "branches"), [(0.0, 1), (1.0, 1), (1.01, 2), (4.0, 2)])
def test_scale_above_one_switches_guidance_on(family: QwenImageFamily, ask: Ask, scale: float, branches: int) -> None:
    rows = family.start(ask(guidance_scale=scale), (EXACT,), EXACT).rows
    assert [row.branch for row in rows] == ["cond", "uncond"][:branches]


def test_silent_negative_prompt_is_an_empty_one(
    engine: Engine, stock: QwenImagePipeline, stock_result: StockResult, ask: Ask, denoise: Denoise
) -> None:
    """Up to rounding, as with any true guidance; the stock pipeline would drop guidance if it were told none."""
    silent, empty = ask(guidance_scale=3.0), ask(guidance_scale=3.0, negative_prompt="")
    latents = denoise(engine, silent).latents
    assert torch.equal(latents, denoise(engine, empty).latents)
    expected = stock_result(stock, empty, engine)
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-5)


def velocity_of(stock: QwenImagePipeline, latents: Tensor, timestep: Tensor, prompt: str) -> Tensor:
    """What the stock transformer predicts for one prompt and a 64 x 64 image."""
    prompt_embeds, _ = stock.encode_prompt(prompt)
    velocity: Tensor = stock.transformer(
        hidden_states=latents,
        encoder_hidden_states=prompt_embeds,
        timestep=timestep[None] / 1000,
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0]
    return velocity


@torch.inference_mode()
def test_checkpoint_that_does_not_rescale_is_guided_plainly(
    directory: Path, engine: Engine, stock: QwenImagePipeline, ask: Ask, denoise: Denoise
) -> None:
    plain = Engine({MODEL: load(directory, CheckpointTraits(rescales_guidance=False))}, engine.cards)
    request = ask(guidance_scale=3.0, negative_prompt="a large blue square", num_inference_steps=3)
    state = plain.start(request)
    latents = state.latents
    for step, timestep in enumerate(state.timesteps):
        cond, uncond = (velocity_of(stock, latents, timestep, p) for p in (request.prompt, "a large blue square"))
        latents = latents + (state.sigmas[step + 1] - state.sigmas[step]) * (uncond + 3 * (cond - uncond))
    ours = denoise(plain, request).latents
    torch.testing.assert_close(ours, latents, rtol=0, atol=1e-5)
    assert not torch.allclose(ours, denoise(engine, request).latents, atol=1e-3)


def test_guided_velocity_has_the_conditional_ones_norm(family: QwenImageFamily, ask: Ask) -> None:
    velocities = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    guided = family.guide(ask(guidance_scale=4.0), velocities)
    torch.testing.assert_close(guided.norm(dim=-1), velocities[:1].norm(dim=-1))
    plain = velocities[1:] + 4 * (velocities[:1] - velocities[1:])
    torch.testing.assert_close(torch.cosine_similarity(guided, plain, dim=-1), torch.ones(1, 6))


# Padding


def denoise_with(engine: Engine, state: DenoiseState, companions: dict[int, DenoiseState]) -> None:
    """Run `state` to its end; each companion is there in the step that it stands under."""
    while not state.is_done:
        company = companions.get(state.step_index)
        engine.step([company, state] if company else [state])


@pytest.mark.parametrize("point", [EXACT, REUSING], ids=["exact", "reusing"])
def test_account_of_a_request_does_not_depend_on_the_padding(
    engine: Engine, ask: Ask, denoise: Denoise, point: CurvePoint
) -> None:
    request = ask(prompt="red", num_inference_steps=3)
    alone, padded = denoise(engine, request, point), engine.start(request, point)
    denoise_with(engine, padded, dict.fromkeys(range(3), engine.start(ask(prompt=LONGEST, num_inference_steps=3))))
    assert padded.spent_flops == alone.spent_flops
    assert padded.dense_flops == alone.dense_flops
    assert padded.summary().compute_ratio == alone.summary().compute_ratio


def test_residuals_hold_real_text_tokens_only(engine: Engine, ask: Ask) -> None:
    states = [engine.start(ask(prompt=prompt), REUSING) for prompt in ("red", LONGEST)]
    engine.step(states)
    for state, length in zip(states, (1 + TEMPLATE_END, 35 + TEMPLATE_END), strict=True):
        assert len(state.rows[0].residuals) == 5
        for residual in state.rows[0].residuals.values():
            assert residual.encoder_hidden_states.shape == (length, 32)


@pytest.mark.parametrize("turns", [[0], [1], [2], [0, 2], [1, 2, 4], [0, 1, 2, 3, 4, 5]])
def test_residuals_are_reused_correctly_as_companions_come_and_go(
    engine: Engine, ask: Ask, denoise: Denoise, turns: list[int]
) -> None:
    """With and without a companion the text stream has 40 and 7 tokens; only one of its steps runs any block."""
    request = ask(prompt="blue square", num_inference_steps=6)
    alone, state = denoise(engine, request, REUSING), engine.start(request, REUSING)
    company = engine.start(ask(prompt=LONGEST, num_inference_steps=6, seed=9), REUSING)
    denoise_with(engine, state, dict.fromkeys(turns, company))
    assert state.summary().decisions == alone.summary().decisions
    assert state.summary().num_reused == 4 * 5
    torch.testing.assert_close(state.latents, alone.latents, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_values_in_the_padding_change_nothing(family: QwenImageFamily, ask: Ask) -> None:
    """Neither scores nor what blocks do to real tokens."""
    states = [family.start(ask(prompt=prompt), (EXACT,), EXACT) for prompt in ("red", LONGEST)]
    streams = family.prologue(states)
    mask = streams.encoder_hidden_states_mask
    assert mask is not None
    noise = 1e3 * torch.randn(streams.encoder_hidden_states.shape, generator=torch.Generator().manual_seed(0))
    disturbed = replace(
        streams, encoder_hidden_states=torch.where(mask[..., None], streams.encoder_hidden_states, noise)
    )
    modulations = family.router_modulations(streams)
    assert modulations is not None
    for block, modulation in zip(family.blocks, modulations, strict=True):
        assert block.router is not None
        answers = [
            block.router((s.encoder_hidden_states, s.hidden_states), modulation, (mask, None))
            for s in (streams, disturbed)
        ]
        torch.testing.assert_close(answers[0].depth_logits, answers[1].depth_logits)
        torch.testing.assert_close(answers[0].width_logits, answers[1].width_logits)
        streams, disturbed = (
            replace(s, hidden_states=image, encoder_hidden_states=text)
            for s in (streams, disturbed)
            for text, image in [block.call(block.variants[1.0], s)]
        )
        torch.testing.assert_close(streams.hidden_states, disturbed.hidden_states)
        torch.testing.assert_close(streams.encoder_hidden_states[mask], disturbed.encoder_hidden_states[mask])


# Blocks


def test_text_mlp_always_runs_in_full(family: QwenImageFamily) -> None:
    for block in family.blocks:
        for width, module in block.variants.items():
            assert module.get_submodule("txt_mlp.net.2").weight.shape == (32, 128)
            assert module.get_submodule("img_mlp.net.2").weight.shape == (32, 128 * width)


@pytest.fixture(scope="module")
def sigmoid_family(directory: Path) -> QwenImageFamily:
    return load(directory, CheckpointTraits(mlp_activation=MlpActivation.GELU_SIGMOID))


@pytest.mark.parametrize("mlp", ["img_mlp", "txt_mlp"])
@pytest.mark.parametrize("width", [0.25, 1.0])
@torch.inference_mode()
def test_sigmoid_form_is_in_both_mlps_at_every_width(sigmoid_family: QwenImageFamily, mlp: str, width: float) -> None:
    inputs = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    for block in sigmoid_family.blocks:
        module = block.variants[width].get_submodule(mlp)
        first, last = module.get_submodule("net.0.proj"), module.get_submodule("net.2")
        assert isinstance(first, nn.Linear)
        assert first.out_features == 128 * (width if mlp == "img_mlp" else 1)
        hidden = first(inputs)
        torch.testing.assert_close(module(inputs), last(hidden * torch.sigmoid(1.702 * hidden)))


def test_activation_changes_the_result_but_no_weight_and_no_name(
    sigmoid_family: QwenImageFamily, engine: Engine, stock: QwenImagePipeline, ask: Ask, denoise: Denoise
) -> None:
    ours, theirs = sigmoid_family.transformer.state_dict(), stock.transformer.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    sigmoid_engine = Engine({MODEL: sigmoid_family}, engine.cards)
    difference = denoise(sigmoid_engine, ask()).latents - denoise(engine, ask()).latents
    assert 1e-4 < difference.abs().max() < 1


def test_activation_of_the_public_checkpoint_is_left_as_it_is(stock: QwenImagePipeline) -> None:
    before = list(stock.transformer.named_modules())
    set_activation(stock.transformer, MlpActivation.GELU_TANH)
    assert list(stock.transformer.named_modules()) == before


# What the card says


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 96)])
def test_exact_equals_the_stock_pipeline_on_the_published_schedule(
    kind: Kind,
    tiny_qwen_image: Path,
    tmp_path: Path,
    stock_result: Callable[..., Any],
    ask: Ask,
    denoise: Denoise,
    height: int,
    width: int,
) -> None:
    """That of Qwen-Image and Qwen-Image-2512, whose noise levels are stretched to end at 0.02."""
    directory = Path(shutil.copytree(tiny_qwen_image, tmp_path / MODEL))
    FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    ).save_pretrained(directory / "scheduler")
    write_manifest(tmp_path / "routers" / MODEL, kind.defaults)
    engine = load_engine([directory], device="cpu", router_weights=tmp_path / "routers")
    stock = QwenImagePipeline.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    request = ask(height=height, width=width)
    assert torch.equal(denoise(engine, request).latents, stock_result(stock, request, engine))


def test_card_has_sizes_defaults_and_guidance(engine: Engine) -> None:
    card = engine.cards[MODEL]
    assert isinstance(card, ImageCard)
    assert card.family == "qwen_image"
    assert card.guidance is Guidance.TRUE
    assert isinstance(card, ImageCard)
    assert (card.default_height, card.default_width) == (64, 80)
    assert card.sizes == SizeLimits(multiple_of=16, minimum=64, maximum=160)
    assert card.max_prompt_characters == 16 * 40
    assert card.blocks == ("block.00", "block.01", "block.02", "block.03", "block.04")


def test_defaults_are_those_of_the_stock_pipeline_where_there_is_no_manifest(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Times are measured at the default size, which takes seconds.
    monkeypatch.setattr(models.zoo, "_dense_step_seconds", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(models.zoo, "_encode_and_decode_seconds", lambda *_: (1.0, 1.0, 1.0))
    card = load_engine([directory], device="cpu", router_weights=tmp_path).cards[MODEL]
    assert isinstance(card, ImageCard)
    assert card.license == "unknown"
    assert isinstance(card, ImageCard)
    assert (card.default_height, card.default_width) == (1024, 1024)
    assert card.sizes == SizeLimits(multiple_of=16, minimum=64, maximum=2048)
    assert (card.default_num_inference_steps, card.default_guidance_scale) == (50, 4.0)


def test_guidance_scale_of_zero_in_the_manifest_is_not_the_default(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.zoo, "_dense_step_seconds", lambda *_: (1.0, 1.0))
    monkeypatch.setattr(models.zoo, "_encode_and_decode_seconds", lambda *_: (1.0, 1.0, 1.0))
    (tmp_path / MODEL).mkdir()
    defaults = '{"num_inference_steps": 8, "guidance_scale": 0}'
    (tmp_path / MODEL / "manifest.json").write_text(f'{{"license": "mit", "defaults": {defaults}}}')
    assert load_engine([directory], device="cpu", router_weights=tmp_path).cards[MODEL].default_guidance_scale == 0


def test_manifest_tells_the_engine_the_traits(
    directory: Path, tmp_path: Path, ask: Ask, denoise: Denoise, sigmoid_family: QwenImageFamily, engine: Engine
) -> None:
    (tmp_path / MODEL).mkdir()
    (tmp_path / MODEL / "manifest.json").write_text(
        '{"license": "mit", "traits": {"mlp_activation": "gelu-sigmoid"}, '
        '"defaults": {"num_inference_steps": 8, "guidance_scale": 1, "height": 64, "width": 64}}'
    )
    loaded = load_engine([directory], device="cpu", router_weights=tmp_path)
    expected = denoise(Engine({MODEL: sigmoid_family}, engine.cards), ask()).latents
    assert torch.equal(denoise(loaded, ask()).latents, expected)


def test_tokens_are_of_sixteen_pixels_and_prompts_of_at_most_what_the_tokenizer_says(family: QwenImageFamily) -> None:
    assert family.pixels_per_token == 16
    assert family.default_side == 1024
    assert family.max_sequence_length == 40
    assert adapter.blocks(family.transformer).keys() == {block.name for block in family.blocks}


def test_parts_of_the_text_encoder_that_no_text_needs_take_no_memory(family: QwenImageFamily) -> None:
    names = [name for name, _ in family.pipeline.text_encoder.named_parameters()]
    assert names
    assert not [name for name in names if "visual" in name or "lm_head" in name]
