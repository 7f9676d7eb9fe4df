from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import batching
from benchmarks.batching import Group, Load, measure, one_group, serve
from benchmarks.engine import requests_for
from models.curve import Preset
from models.engine import Engine
from models.request import GenerationRequest, PresetBudget
from models.zoo import load_engine
from service.scheduling.batching import Candidate, form_groups
from training.scenes.prompts import complex_scenes

MODEL = "tiny-flux"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine([Path("checkpoints/tiny-flux")], device="cpu", router_weights=Path("router_weights"))


def test_ratios_are_times_under_our_batcher_over_times_in_one_group(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(_: Engine, requests: Sequence[GenerationRequest], group: Group) -> list[float]:
        if len(requests) == 1:
            return [5.0] if requests[0].budget == PresetBudget(Preset.EXACT) else [2.0]
        assert [request.budget for request in requests] == [PresetBudget(Preset.EXACT), PresetBudget(Preset.DRAFT)]
        return [6.0, 1.0] if group is form_groups else [8.0, 4.0]

    monkeypatch.setattr(batching, "serve", ends)
    row = measure(engine, MODEL, 64, Load(1, 1), num_rounds=3)
    assert row == {
        "side": 64,
        "dense": 1,
        "light": 1,
        "dense_ratio": 0.75,
        "light_ratio": 0.25,
        "dense_of_share": 0.6,
        "light_of_share": 0.25,
        "all_ratio": 0.75,
        "all_seconds": 6.0,
    }


def test_load_of_one_kind_has_no_ratio_of_the_other(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "serve", lambda _, requests, *__: [1.0] * len(requests))
    row = measure(engine, MODEL, 64, Load(0, 2), num_rounds=1)
    assert (row["dense_ratio"], row["light_ratio"], row["all_ratio"]) == (None, 1.0, 1.0)
    assert (row["dense_of_share"], row["light_of_share"]) == (None, 0.5)


@pytest.mark.parametrize(("is_shared", "num_turns"), [(True, 1), (False, 2)])
def test_batcher_decides_how_many_requests_share_a_step(engine: Engine, is_shared: bool, num_turns: int) -> None:
    """`num_turns` for each computed step of a request."""
    turns: list[int] = []

    def group(candidates: Sequence[Candidate]) -> list[list[int]]:
        turns.append(len(candidates))
        return one_group(candidates) if is_shared else [[place] for place in range(len(candidates))]

    requests = requests_for(engine, MODEL, complex_scenes(2), PresetBudget(Preset.DRAFT), 64)
    first_end, second_end = serve(engine, requests, group)
    assert len(turns) == num_turns * requests[0].num_computed_steps
    assert 0 < first_end <= second_end
