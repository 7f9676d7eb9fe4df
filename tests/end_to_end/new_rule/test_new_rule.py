"""A new rule is its file and one line of the table: all else follows."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from models.calibration import calibrate_model
from models.rules import RULES
from models.zoo import load_engine
from service.app import build_dispatcher, create_app
from service.settings import Settings
from tests.end_to_end.new_rule.every_other import EveryOtherRule

MODEL = Path(__file__).parents[3] / "checkpoints/tiny-flux"


@pytest.fixture
def router_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without routers; the rule has its line in the table."""
    monkeypatch.setitem(RULES, "every_other", EveryOtherRule())
    return tmp_path


@pytest.mark.slow
def test_rule_is_calibrated_described_and_served(router_weights: Path) -> None:
    # Given a calibration by the rule's own ladder
    calibrate_model(MODEL, ["a red circle"], rules=["every_other"], device="cpu", router_weights=router_weights)
    settings = Settings(models=(MODEL,), router_weights=router_weights)
    dispatcher = build_dispatcher(settings, lambda: load_engine([MODEL], device="cpu", router_weights=router_weights))
    dispatcher.worker.start()

    with TestClient(create_app(settings, dispatcher)) as client:
        # When the model is described and asked for its cheapest point
        (model,) = client.get("/v1/models").json()["data"]
        body = {"prompt": "a red circle", "seed": 1, "budget": {"quality": 0}, "response_format": "url", "trace": True}
        answer = client.post("/v1/images", json={**body, "num_inference_steps": 6})

    # Then the curve has the rule's policies, and the request ran by the cheaper one
    assert "every_other" in model["rules"]
    assert [(point["rule"], point["policy"]) for point in model["curve"]] == [
        ("dense", {}),
        ("every_other", {"first_step": 5}),
        ("every_other", {"first_step": 1}),
    ]
    assert answer.status_code == 200, answer.text
    receipt = answer.json()["receipt"]
    assert receipt["rule"] == "every_other"
    reused = [step for step, blocks in enumerate(receipt["decisions"]) if any(b["decision"] == "reuse" for b in blocks)]
    assert reused == [1, 3, 5]
