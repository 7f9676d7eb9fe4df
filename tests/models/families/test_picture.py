"""What every text-to-image family does with a request."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.card import EXACT, CurvePoint, Policy
from models.elastic.runner import Streams
from models.engine import Engine
from models.families.picture import PictureFamily
from models.request import GenerationRequest

Ask = Callable[..., GenerationRequest]
Guided = Callable[..., dict[str, Any]]


@pytest.mark.parametrize(
    "point",
    [
        EXACT,
        CurvePoint("router", Policy(0.3, 0.3, 2, width_bias=1.0), 0.5, 0.5, 0.5),
        CurvePoint("residual_cache", Policy(residual_threshold=1.3, max_reuses=2), 0.5, 0.5, 0.5),
    ],
    ids=lambda point: point.rule,
)
def test_compute_ratio_is_what_torch_counts_in_the_blocks(
    family: PictureFamily, engine: Engine, ask: Ask, guided: Guided, point: CurvePoint
) -> None:
    """Both prompts have as many tokens, so nothing is padded: padding is multiplied too, but is on nobody's account."""
    counted = 0.0

    def counting_call(module: nn.Module, streams: Streams) -> tuple[Tensor, Tensor]:
        nonlocal counted
        # Torch counts attention by its parts; the fused kernel of a CPU it does not know.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = family.anatomy.call_block(module, streams)
        counted += counter.get_total_flops()
        return result

    watched = copy.copy(family)
    watched.blocks = tuple(replace(block, call=counting_call) for block in family.blocks)
    watched_engine = Engine({family.model_id: watched}, engine.cards)
    request = ask(num_inference_steps=5, **guided("a large blue square on the right"))
    state = watched_engine.start(request, point)
    while not state.is_done:
        watched_engine.step([state])
    assert state.spent_flops == pytest.approx(counted, rel=0.01)
    assert state.summary().compute_ratio == pytest.approx(counted / (5 * state.dense_flops), rel=0.01)
    assert point is EXACT or state.summary().compute_ratio < 0.95


def test_noise_depends_on_the_seed_alone(family: PictureFamily, ask: Ask, guided: Guided) -> None:
    first, other_prompt, other_seed = (
        family.start(request, (EXACT,), EXACT).latents
        for request in (ask(), ask(prompt="a blue square", num_inference_steps=7, **guided()), ask(seed=1))
    )
    assert torch.equal(first, other_prompt)
    assert not torch.equal(first, other_seed)


def test_requests_of_one_size_share_a_batch(family: PictureFamily, ask: Ask, guided: Guided) -> None:
    keys = [
        family.start(request, (EXACT,), EXACT).batch_key
        for request in (ask(), ask(num_inference_steps=9, prompt="red", **guided()), ask(width=80), ask(height=80))
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_each_branch_is_a_row_with_inputs_of_its_own(family: PictureFamily, ask: Ask, guided: Guided) -> None:
    for fields, branches in (({}, ["cond"]), (guided("red"), ["cond", "uncond"])):
        state = family.start(ask(**fields), (EXACT,), EXACT)
        assert [row.branch for row in state.rows] == branches
        assert len(state.inputs) == len(branches)
        assert len({part.context.sum().item() for part in state.inputs}) == len(branches)


def test_dense_compute_is_the_sum_over_branches_and_blocks(family: PictureFamily, ask: Ask, guided: Guided) -> None:
    state = family.start(ask(width=96, prompt="red", **guided("a green triangle")), (EXACT,), EXACT)
    costs = [family.block_costs(64, 96, inputs.num_text_tokens) for inputs in state.inputs]
    assert state.dense_flops == sum(cost.dense for branch in costs for cost in branch.values())


def test_position_factors_of_other_sizes_and_lengths_are_not_mixed_up(family: PictureFamily, ask: Ask) -> None:
    keys = [(length, height, width) for length in range(5, 15) for height, width in ((64, 64), (64, 96), (96, 64))]
    for _ in range(3):  # more than are kept
        for length, height, width in keys:
            ours = family._rotary_embedding(ask(height=height, width=width), length)
            expected = family.anatomy.rotary_embedding(family.transformer, length, height // 16, width // 16)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert len(family._rotary) <= 64
