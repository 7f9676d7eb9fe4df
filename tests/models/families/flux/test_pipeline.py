import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.card import CurvePoint, Policy
from models.elastic.router import MLP_WIDTHS
from models.elastic.runner import Streams
from models.engine import Engine
from models.errors import InvalidRequest
from models.families.flux import adapter
from models.families.flux.pipeline import FluxFamily, mlp_layers
from models.request import GenerationRequest

MODEL = "tiny-flux"
CHANNELS, HIDDEN = 32, 128
Ask = Callable[..., GenerationRequest]


def streams_of(family: FluxFamily, batch: int = 1) -> Streams:
    rng = torch.Generator().manual_seed(0)
    tokens = family.max_sequence_length
    image, text = (torch.randn(batch, count, CHANNELS, generator=rng) for count in (24, tokens))
    rotary = adapter.rotary_embedding(family.transformer, tokens, 4, 6)
    return Streams(image, text, torch.randn(batch, CHANNELS, generator=rng), rotary)


@torch.inference_mode()
def counted_flops(call: Callable[[], object]) -> int:
    # Torch counts attention by its parts; the fused kernel of a CPU it does not know.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("width", MLP_WIDTHS)
@pytest.mark.parametrize("index", [0, 2], ids=["double", "single"])
@pytest.mark.parametrize("batch", [1, 3])
def test_cost_of_a_block_is_what_torch_counts(family: FluxFamily, index: int, width: float, batch: int) -> None:
    block, streams = family.blocks[index], streams_of(family, batch)
    expected = batch * family.block_costs(64, 96)[block.name].at_width(width)
    assert counted_flops(lambda: block.call(block.variants[width], streams)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    "point",
    [
        CurvePoint("dense", Policy(), 1.0, 1.0, 1.0),
        CurvePoint("router", Policy(0.3, 0.3, 2, width_bias=1.0), 0.5, 0.5, 0.5),
        CurvePoint("residual_cache", Policy(residual_threshold=0.8, max_reuses=2), 0.5, 0.5, 0.5),
    ],
    ids=lambda point: point.rule,
)
def test_compute_ratio_is_what_torch_counts_in_the_blocks(
    family: FluxFamily, engine: Engine, ask: Ask, point: CurvePoint
) -> None:
    counted = 0

    def counting_call(module: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        nonlocal counted
        result: list[tuple[Tensor, Tensor]] = []
        counted += counted_flops(lambda: result.append(adapter.call_block(module, streams)))
        return result[0]

    watched = copy.copy(family)
    watched.blocks = tuple(replace(block, call=counting_call) for block in family.blocks)
    request = ask(negative_prompt="a blue square", true_cfg_scale=2.0, num_inference_steps=5)
    watched_engine = Engine({MODEL: watched}, engine.cards)
    state = watched_engine.start(request, point)
    while not state.is_done:
        watched_engine.step([state])
    assert state.spent_flops == pytest.approx(counted, rel=0.01)
    assert state.summary().compute_ratio == pytest.approx(counted / (5 * state.dense_flops), rel=0.01)


@pytest.mark.parametrize("width", MLP_WIDTHS)
@pytest.mark.parametrize("index", [0, 3], ids=["double", "single"])
def test_narrow_block_multiplies_narrow_matrices(family: FluxFamily, index: int, width: float) -> None:
    module = family.blocks[index].variants[width]
    first, last, _ = mlp_layers(module)
    column = mlp_layers(family.blocks[index].variants[1.0])[2]
    assert first.weight.shape == (HIDDEN * width, CHANNELS)
    assert last.weight.shape == (CHANNELS, column + HIDDEN * width)
    sizes: list[int] = []
    handle = first.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-1]))
    family.blocks[index].call(module, streams_of(family))
    handle.remove()
    assert sizes == [HIDDEN * width]


@pytest.mark.parametrize("width", MLP_WIDTHS)
@pytest.mark.parametrize("index", [1, 5], ids=["double", "single"])
@torch.inference_mode()
def test_narrow_block_equals_the_block_with_its_other_neurons_masked(
    family: FluxFamily, index: int, width: float
) -> None:
    block, streams = family.blocks[index], streams_of(family, 2)
    _, last, column = mlp_layers(block.variants[1.0])
    mask = (torch.arange(column + HIDDEN) < column + HIDDEN * width).float()
    handle = last.register_forward_pre_hook(lambda module, args: (args[0] * mask,))
    masked = block.call(block.variants[1.0], streams)
    handle.remove()
    for ours, expected in zip(block.call(block.variants[width], streams), masked, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_text_mlp_of_a_double_block_always_runs_in_full(family: FluxFamily) -> None:
    for module in family.blocks[0].variants.values():
        assert module.get_submodule("ff_context.net.2").weight.shape == (CHANNELS, HIDDEN)


def test_widths_share_the_memory_of_the_checkpoint(family: FluxFamily) -> None:
    for block in family.blocks:
        originals = {p.untyped_storage().data_ptr() for p in block.variants[1.0].parameters()}
        for module in block.variants.values():
            assert {p.untyped_storage().data_ptr() for p in module.parameters()} == originals


def test_rotary_embedding_is_that_of_the_stock_pipeline(family: FluxFamily, stock: FluxPipeline) -> None:
    image_ids = stock._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    expected = stock.transformer.pos_embed(torch.cat((torch.zeros(7, 3), image_ids)))
    for ours, theirs in zip(adapter.rotary_embedding(family.transformer, 7, 4, 6), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_noise_depends_on_the_seed_alone(family: FluxFamily, ask: Ask) -> None:
    point = CurvePoint("dense", Policy(), 1.0, 1.0, 1.0)
    first, other_prompt, other_seed = (
        family.start(request, (point,), point).latents
        for request in (ask(), ask(prompt="a blue square", num_inference_steps=7), ask(seed=1))
    )
    assert torch.equal(first, other_prompt)
    assert not torch.equal(first, other_seed)


def test_requests_of_one_size_share_a_batch(family: FluxFamily, ask: Ask) -> None:
    point = CurvePoint("dense", Policy(), 1.0, 1.0, 1.0)
    keys = [
        family.start(request, (point,), point).batch_key
        for request in (
            ask(),
            ask(num_inference_steps=9, guidance_scale=1.0, negative_prompt="red", true_cfg_scale=2.0),
            ask(width=80),
        )
    ]
    assert keys[0] == keys[1]
    assert keys[0] != keys[2]


@pytest.mark.parametrize(
    ("fields", "branches"),
    [
        ({}, ["cond"]),
        ({"negative_prompt": "red", "true_cfg_scale": 1.0}, ["cond"]),
        ({"true_cfg_scale": 2.0}, ["cond"]),
        ({"negative_prompt": "", "true_cfg_scale": 2.0}, ["cond", "uncond"]),
    ],
)
def test_second_branch_needs_a_negative_prompt_and_a_scale(
    family: FluxFamily, ask: Ask, fields: dict[str, object], branches: list[str]
) -> None:
    point = CurvePoint("dense", Policy(), 1.0, 1.0, 1.0)
    assert [row.branch for row in family.start(ask(**fields), (point,), point).rows] == branches


@pytest.mark.parametrize("param", ["prompt", "negative_prompt"])
def test_prompt_with_too_many_tokens_is_refused(engine: Engine, ask: Ask, param: str) -> None:
    longest = " ".join(["red"] * 39)
    engine.start(ask(true_cfg_scale=2.0, **{param: longest}))
    with pytest.raises(InvalidRequest, match=f"{param} has 41 tokens; {MODEL} reads at most 40") as error:
        engine.start(ask(true_cfg_scale=2.0, **{param: longest + " red"}))
    assert error.value.param == param


def test_sizes_are_multiples_of_a_latent_patch(family: FluxFamily) -> None:
    assert family.pixels_per_token == 16
    assert family.max_sequence_length == 40
