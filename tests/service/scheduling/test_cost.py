from collections.abc import Callable

import pytest

from models.card import ModelCard
from models.request import GenerationRequest, Preset, PresetBudget
from service.scheduling.cost import predicted_seconds

EXACT = PresetBudget(Preset.EXACT)


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({"budget": EXACT}, 2.0),
        ({"budget": EXACT, "num_inference_steps": 8}, 4.0),
        ({"budget": EXACT, "height": 128, "width": 128}, 8.0),
        ({"budget": EXACT, "negative_prompt": "", "true_cfg_scale": 4.0}, 4.0),
        ({"budget": PresetBudget(Preset.FAST)}, 1.1),
    ],
)
def test_cost_grows_with_steps_pixels_branches_and_budget(
    fields: dict[str, object], seconds: float, make_request: Callable[..., GenerationRequest], drawn_card: ModelCard
) -> None:
    assert predicted_seconds(make_request(**fields), drawn_card) == pytest.approx(seconds)
