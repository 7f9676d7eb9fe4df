"""The scheduler tells which requests can share steps before the engine has started them."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.curve import Preset
from models.engine import Engine
from models.request import GenerationRequest, PresetBudget
from service.scheduling.batching import shape_of, step_shape
from tests.fixtures.generation import edit_of

fields = st.fixed_dictionaries(
    {
        "width": st.sampled_from([64, 80]),
        "height": st.sampled_from([64, 80]),
        "seed": st.integers(0, 2),
        "num_inference_steps": st.integers(1, 3),
        "prompt": st.sampled_from(["red", "a small blue circle"]),
        "budget": st.sampled_from([PresetBudget(Preset.EXACT), PresetBudget(Preset.DRAFT), PresetBudget(Preset.HIGH)]),
    }
)


DRAFT = PresetBudget(Preset.DRAFT)


@settings(max_examples=20)
@given(a=fields, b=fields, guides_b=st.booleans())
def test_states_have_one_batch_key_just_if_their_requests_have_one_shape_and_are_not_exact(
    engine: Engine,
    ask: Callable[..., GenerationRequest],
    guided: Callable[..., Mapping[str, Any]],
    a: dict[str, Any],
    b: dict[str, Any],
    guides_b: bool,
) -> None:
    first, second = ask(**a), ask(**b, **(guided() if guides_b else {}))
    states = [engine.start(first), engine.start(second)]  # both, since the key of an exact state is its own while it is
    have_one_key = states[0].batch_key == states[1].batch_key
    assert (step_shape(shape_of(first)) == step_shape(shape_of(second)) and not first.wants_exact) == have_one_key


@pytest.mark.parametrize("kind", ["flux_kontext", "qwen_image_edit_plus"], indirect=True, scope="session")
def test_requests_of_one_shape_have_pictures_of_one_size(engine: Engine, ask: Callable[..., GenerationRequest]) -> None:
    """Pictures of two sizes may be read at one size: then the states share steps, though the scheduler can't know."""
    requests = [
        ask(budget=DRAFT, edit=edit_of(size, seed=seed)) for seed, size in enumerate([(50, 70), (50, 70), (90, 30)])
    ]
    assert shape_of(requests[0]) == shape_of(requests[1]) != shape_of(requests[2])
    keys = [engine.start(request).batch_key for request in requests]
    assert keys[0] == keys[1] != keys[2]
