import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from models.curve import Preset
from models.request import ComputeBudget, LatencyBudget, PresetBudget, QualityBudget
from service.api.validation import invalid_request
from service.budget import BudgetBody, budget_fields


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("fast", PresetBudget(Preset.FAST)),
        ("quality=0.9", QualityBudget(0.9)),
        ("quality=0", QualityBudget(0.0)),
        ("compute_ratio=0.5", ComputeBudget(0.5)),
        ("latency_ms=800", LatencyBudget(0.8)),
    ],
)
def test_short_form_names_a_budget(text: str, budget: object) -> None:
    assert BudgetBody.model_validate(budget_fields(text)).to_budget() == budget


@given(st.floats(min_value=0, max_value=1))
def test_every_quality_in_range_is_a_budget(quality: float) -> None:
    assert BudgetBody.model_validate({"quality": quality}).to_budget() == QualityBudget(quality)


@given(st.one_of(st.floats().filter(lambda x: not 0 < x <= 1), st.booleans(), st.text(), st.lists(st.integers())))
def test_everything_else_is_no_compute_ratio(value: object) -> None:
    with pytest.raises(ValidationError) as caught:
        BudgetBody.model_validate({"compute_ratio": value})
    assert invalid_request(caught.value.errors()[0]).param == "compute_ratio"


@given(
    st.dictionaries(
        st.sampled_from(["preset", "quality", "compute_ratio", "min_quality", "latency_ms", "x"]),
        st.none() | st.floats() | st.text(),
    )
)
def test_a_budget_has_exactly_one_form(fields: dict[str, object]) -> None:
    try:
        body = BudgetBody.model_validate(fields)
    except ValidationError:
        return
    given_forms = [
        name for name in ("preset", "quality", "compute_ratio", "latency_ms") if fields.get(name) is not None
    ]
    assert len(given_forms) == 1
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in fields.values())
    body.to_budget()


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({}, "exactly one of preset, quality, compute_ratio and latency_ms; this one has none", ""),
        ({"preset": "fast", "quality": 0.5}, "this one has preset and quality", ""),
        ({"quality": 1.5}, "quality 1.5 is above 1.0; try 1.0", "quality"),
        ({"quality": 0.5, "min_quality": 0.6}, "min_quality 0.6 is above the quality 0.5", ""),
        ({"preset": "quick"}, "preset 'quick' is not one of 'exact', 'high', 'balanced', 'fast' or 'draft'", "preset"),
        ({"latency_ms": 0}, "latency_ms 0 is not above 0.0", "latency_ms"),
        ({"speed": 1}, "unknown field speed", "speed"),
    ],
)
def test_refusal_names_what_is_wrong(fields: dict[str, object], message: str, param: str) -> None:
    with pytest.raises(ValidationError) as caught:
        BudgetBody.model_validate(fields)
    error = invalid_request(caught.value.errors()[0])
    assert message in str(error)
    assert error.param == param
