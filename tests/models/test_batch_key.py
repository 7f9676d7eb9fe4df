"""The scheduler tells which requests can share steps before the engine has started them."""

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from models.engine import Engine
from models.request import GenerationRequest
from service.scheduling.batching import shape_of

fields = st.fixed_dictionaries(
    {
        "width": st.sampled_from([64, 80]),
        "height": st.sampled_from([64, 80]),
        "seed": st.integers(0, 2),
        "num_inference_steps": st.integers(1, 3),
        "prompt": st.sampled_from(["red", "a small blue circle"]),
    }
)


@settings(max_examples=15)
@given(a=fields, b=fields, guides_b=st.booleans())
def test_requests_have_one_shape_just_if_their_states_have_one_batch_key(
    engine: Engine,
    ask: Callable[..., GenerationRequest],
    guided: Callable[..., Mapping[str, Any]],
    a: dict[str, Any],
    b: dict[str, Any],
    guides_b: bool,
) -> None:
    first, second = ask(**a), ask(**b, **(guided() if guides_b else {}))
    have_one_key = engine.start(first).batch_key == engine.start(second).batch_key
    assert (shape_of(first) == shape_of(second)) == have_one_key
