"""What every text-to-image family does with a request."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.curve import EXACT
from models.families.image import ImageFamily
from models.report import TokenCounts
from models.request import ImageRequest
from models.state import DenoiseState

Ask = Callable[..., ImageRequest]
Guided = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session", params=["flux", "flux_kontext", "qwen_image", "qwen_image_edit_2511"])
def kind(kind: Any) -> Any:
    """The families that draw images."""
    return kind


def reference_sizes(state: DenoiseState) -> tuple[tuple[int, int], ...]:
    references = state.inputs[0].references
    return references.sizes if references else ()


def test_noise_depends_on_the_seed_alone(family: ImageFamily, ask: Ask, guided: Guided) -> None:
    first, other_prompt, other_seed = (
        family.start(request, (EXACT,), EXACT).latents
        for request in (ask(), ask(prompt="a blue square", num_inference_steps=7, **guided()), ask(seed=1))
    )
    assert torch.equal(first, other_prompt)
    assert not torch.equal(first, other_seed)


def test_requests_of_one_size_share_a_batch(family: ImageFamily, ask: Ask, guided: Guided) -> None:
    keys = [
        family.start(request, (EXACT,), EXACT).shape
        for request in (ask(), ask(num_inference_steps=9, prompt="red", **guided()), ask(width=80), ask(height=80))
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_each_branch_is_a_row_with_inputs_of_its_own(family: ImageFamily, ask: Ask, guided: Guided) -> None:
    for fields, branches in (({}, ["cond"]), (guided("red"), ["cond", "uncond"])):
        state = family.start(ask(**fields), (EXACT,), EXACT)
        assert [row.branch for row in state.rows] == branches
        assert len(state.inputs) == len(branches)
        assert len({part.context.sum().item() for part in state.inputs}) == len(branches)


def test_tokens_are_those_of_the_prompts_and_of_the_latents(family: ImageFamily, ask: Ask, guided: Guided) -> None:
    def start(prompt: str, **fields: Any) -> DenoiseState:
        return family.start(ask(prompt=prompt, width=96, height=64, **fields), (EXACT,), EXACT)

    def tokens(prompt: str, **fields: Any) -> TokenCounts:
        return start(prompt, **fields).summary().tokens

    short, long = tokens("red"), tokens("a red circle above a blue square")
    num_reference_tokens = sum(height * width for height, width in reference_sizes(start("red")))
    assert (short.latents, short.pictures) == (24, num_reference_tokens)
    assert 0 < short.prompts < long.prompts
    assert tokens("red", **guided("red")).prompts == 2 * short.prompts


def test_dense_compute_is_the_sum_over_branches_and_blocks(family: ImageFamily, ask: Ask, guided: Guided) -> None:
    state = family.start(ask(width=96, prompt="red", **guided("a green triangle")), (EXACT,), EXACT)
    num_reference_tokens = sum(height * width for height, width in reference_sizes(state))
    costs = [family.block_costs(64, 96, inputs.num_text_tokens, num_reference_tokens) for inputs in state.inputs]
    assert state.dense_flops == sum(cost.dense for branch in costs for cost in branch.values())


def test_position_factors_of_other_sizes_and_lengths_are_not_mixed_up(family: ImageFamily, ask: Ask) -> None:
    sizes = ((64, 64), (64, 96), (96, 64))
    started = [family.start(ask(height=height, width=width), (EXACT,), EXACT) for height, width in sizes]
    keys = [(length, *size, state) for length in range(5, 15) for size, state in zip(sizes, started, strict=True)]
    for _ in range(3):  # more than are kept
        for length, height, width, state in keys:
            ours = family._rotary_embedding([state], length)
            adapter: Any = family.adapter
            references = reference_sizes(state)
            expected = adapter.rotary_embedding(family.transformer, length, height // 16, width // 16, references)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert len(family._rotary) <= 64


def test_similarity_is_one_for_equal_images_and_less_for_others(family: ImageFamily) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert family.similarity(image, image) == 1
    assert family.similarity(image, 255 - image) < 0.1
