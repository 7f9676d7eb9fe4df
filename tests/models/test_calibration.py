import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.calibration import (
    NUM_LEARNED,
    Calibration,
    _default_samples,
    _opened,
    _request,
    calibrate_model,
    computed_steps,
    efficient,
    name_presets,
    promised_quality,
    thinned,
)
from models.curve import EXACT, FORECAST, CurvePoint, Preset
from models.engine import Engine
from models.request import GenerationRequest, ImageRequest
from models.rules import ladder
from models.rules.router import RouterPolicy
from models.state import DenoiseState
from models.trajectories import forecast_point, with_forecasts
from models.zoo import load_engine
from tests.fixtures.kinds import Kind

points = st.builds(
    CurvePoint,
    policy=st.just(RouterPolicy()),
    compute_ratio=st.floats(0, 1) | st.sampled_from([0.25, 0.5, 1.0]),
    relative_seconds=st.just(1.0),
    quality=st.floats(0, 1) | st.sampled_from([0.25, 0.5, 1.0]),
    mean_quality=st.just(1.0),
)


@given(st.lists(points, max_size=12))
def test_efficient_points_descend_strictly_in_compute_and_quality(measured: list[CurvePoint]) -> None:
    for upper, lower in pairwise([EXACT, *efficient(measured)]):
        assert upper.compute_ratio > lower.compute_ratio
        assert upper.quality > lower.quality


@given(st.lists(points, max_size=12))
def test_efficient_points_are_those_that_none_beats(measured: list[CurvePoint]) -> None:
    kept = efficient(measured)
    for point in measured:
        if point.compute_ratio < 1 and point.quality < 1:
            assert any(k.compute_ratio <= point.compute_ratio and k.quality >= point.quality for k in kept)
    assert all(point in measured for point in kept)


@given(st.lists(points, max_size=12), st.randoms(use_true_random=False))
def test_efficient_points_do_not_depend_on_the_order_of_measuring(
    measured: list[CurvePoint], rng: random.Random
) -> None:
    shuffled = list(measured)
    rng.shuffle(shuffled)
    assert efficient(shuffled) == efficient(measured)


@given(st.lists(points, max_size=12))
def test_thinned_curve_has_no_near_twins_and_a_better_point_for_each_that_went(measured: list[CurvePoint]) -> None:
    curve = efficient(measured)
    kept = thinned(curve)
    assert all(upper.compute_ratio - lower.compute_ratio >= 0.0149 for upper, lower in pairwise(kept))
    for point in set(curve) - set(kept):
        assert any(0 <= k.compute_ratio - point.compute_ratio < 0.0151 and k.quality > point.quality for k in kept)


@given(st.lists(st.floats(0.01, 0.99), max_size=8, unique=True))
def test_a_faster_preset_never_costs_more(ratios: list[float]) -> None:
    curve = name_presets([CurvePoint(RouterPolicy(), ratio, ratio, ratio, ratio) for ratio in sorted(ratios)[::-1]])
    cost = {point.preset: point.compute_ratio for point in curve if point.preset}
    named = [cost[preset] for preset in Preset if preset in cost]
    assert named == sorted(named, reverse=True)


@given(st.lists(points, max_size=12))
def test_each_preset_names_at_most_one_point(measured: list[CurvePoint]) -> None:
    names = [point.preset for point in name_presets(efficient(measured)) if point.preset]
    assert len(names) == len(set(names))
    assert Preset.EXACT not in names


def test_presets_name_the_cheapest_points_of_their_quality() -> None:
    qualities = [0.999, 0.995, 0.991, 0.98, 0.96, 0.95, 0.93, 0.86, 0.84]
    curve = [CurvePoint(RouterPolicy(), q - 0.5, q, q, q) for q in qualities]
    named = {point.quality: point.preset for point in name_presets(curve) if point.preset}
    assert named == {0.991: Preset.HIGH, 0.98: Preset.BALANCED, 0.95: Preset.FAST, 0.86: Preset.DRAFT}


def test_presets_whose_quality_no_point_has_take_the_best_that_are_left() -> None:
    curve = [CurvePoint(RouterPolicy(), q, q, q, q) for q in (0.9, 0.8, 0.7)]
    assert [point.preset for point in name_presets(curve)] == [Preset.HIGH, Preset.BALANCED, Preset.FAST]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
def test_promised_quality_is_one_that_all_but_a_few_samples_reach(qualities: list[float]) -> None:
    promised = promised_quality(qualities)
    reached = sum(quality >= promised for quality in qualities) / len(qualities)
    assert reached >= 15 / 16 or promised == min(qualities)


def test_promise_of_32_samples_is_kept_by_new_ones() -> None:
    """Over many calibrations, 88 % of new samples reach it in at least nine of ten."""
    rng = random.Random(0)
    kept = [promised_quality([rng.random() for _ in range(32)]) <= 0.12 for _ in range(2000)]
    assert sum(kept) / len(kept) > 0.9


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 19, 20, 28, 50, 100])
def test_numbers_of_computed_steps_to_calibrate_leave_something_to_forecast(num_steps: int) -> None:
    nums = computed_steps(num_steps)
    assert nums == sorted(set(nums))
    assert all(0 < num < num_steps for num in nums)
    assert len(nums) >= min(num_steps - 1, 3) - 1


PUBLISHED = (
    RouterPolicy(skip_threshold=0.5, reuse_band=0.05, max_reuses=7, reuse_from_step=3),
    RouterPolicy(0.33, 0.2, 5),
)


@pytest.mark.parametrize(("rule", "published"), [("router", ()), ("router", PUBLISHED)])
def test_no_setting_is_tried_twice(rule: str, published: tuple[RouterPolicy, ...]) -> None:
    settings = ladder(rule, published)
    assert len(set(settings)) == len(settings)


def test_published_policies_are_tried_as_they_are_and_at_other_thresholds() -> None:
    added = [policy for policy in ladder("router", PUBLISHED) if policy not in ladder("router", ())]
    for policy in PUBLISHED:
        assert policy in added
        routed = [other for other in added if isinstance(other, RouterPolicy)]
        of_it = [replace(other, skip_threshold=policy.skip_threshold) for other in routed]
        assert of_it.count(policy) > 3


SAMPLES = 19


@pytest.fixture
def requests(ask: Callable[..., GenerationRequest], guided: Callable[..., dict[str, Any]], kind: Kind) -> Any:
    fields = guided() if kind.true_scale == "guidance_scale" else {}
    return [ask(num_inference_steps=8, seed=seed, **fields) for seed in range(SAMPLES)]


def assert_descends(curve: Sequence[CurvePoint]) -> None:
    assert curve[0].is_exact
    assert (curve[0].preset, curve[0].compute_ratio, curve[0].quality) == (Preset.EXACT, 1, 1)
    assert len(curve) > 1
    for upper, lower in pairwise(curve):
        assert upper.compute_ratio > lower.compute_ratio
        assert upper.quality > lower.quality
    assert all(point.relative_seconds > 0 for point in curve)
    assert all(point.quality <= point.mean_quality for point in curve)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux"], indirect=True, scope="session")
def test_calibration_of_blocks_measures_a_descending_curve(
    engine: Engine, requests: list[GenerationRequest], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = ladder("router", ())[:4]
    blocks = [CurvePoint(policy, 1.0, 1.0, 1.0, 1.0) for policy in policies]
    curve = Calibration(engine, [], requests[:2], blocks, tmp_path).run("cpu")
    printed = capsys.readouterr().out
    assert [policy for policy in policies if str(policy) in printed] == policies
    assert_descends(curve)
    assert {point.rule for point in curve[1:]} == {"router"}


@pytest.mark.slow
@pytest.mark.long
def test_calibrated_forecasts_beat_fewer_steps(
    engine: Engine, requests: list[GenerationRequest], tmp_path: Path
) -> None:
    """Nearer to the exact latents, for as many computed steps, on requests that nothing was learned from."""
    calibration = Calibration(engine, requests[:NUM_LEARNED], requests[NUM_LEARNED:], [], tmp_path)
    assert_descends(calibration.run("cpu"))
    table = calibration.table
    assert table is not None
    for request in requests[NUM_LEARNED:]:
        exact, ours, fewer = (
            engine.start(r, EXACT) for r in (request, request, replace(request, num_inference_steps=4))
        )
        with_forecasts([ours], table)
        ours.point = forecast_point(4, ours)
        for state in (exact, ours, fewer):
            while not state.is_done:
                engine.step([state])
        assert (ours.latents - exact.latents).norm() < (fewer.latents - exact.latents).norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flux"], indirect=True, scope="session")
def test_interrupted_calibration_goes_on_where_it_was(
    engine: Engine, requests: list[GenerationRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was learned and measured is not computed again, and the curve is the same up to its times."""
    learned, measured = requests[:NUM_LEARNED], [*requests[NUM_LEARNED:]] * 4  # two batches
    whole = Calibration(engine, learned, measured, [], tmp_path / "whole").run("cpu")
    interrupted = Calibration(engine, learned, measured, [], tmp_path / "parts")
    compute = engine._compute
    batches: list[int] = []

    def stop(states: Sequence[DenoiseState]) -> Any:
        if (tmp_path / "parts" / "measured-0.json").exists():
            raise KeyboardInterrupt
        return compute(states)

    def watch(states: Sequence[DenoiseState]) -> Any:
        batches.append(len(states))
        return compute(states)

    monkeypatch.setattr(engine, "_compute", stop)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run("cpu")
    monkeypatch.setattr(engine, "_compute", watch)
    resumed = Calibration(engine, learned, measured, [], tmp_path / "parts").run("cpu")
    assert set(batches) == {4, 1}, "the second batch of four, and the timed ones alone"
    timeless = [[replace(point, relative_seconds=1.0) for point in curve] for curve in (whole, resumed)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("kind", ["flux"], indirect=True, scope="session")
def test_calibration_says_what_it_will_cost_before_it_computes(
    engine: Engine,
    requests: list[GenerationRequest],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(states: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_compute", refuse)
    with pytest.raises(KeyboardInterrupt):
        Calibration(engine, requests[:NUM_LEARNED], requests[NUM_LEARNED:], [], tmp_path).run("cpu")
    assert re.search(r"16 samples to learn from, 3 to measure; at most \d+ steps, .* minutes", capsys.readouterr().out)


def test_what_was_kept_of_other_weights_or_samples_is_not_used(tmp_path: Path) -> None:
    (_opened(tmp_path / "kept", "weights A") / "measured-0.json").write_text("{}")
    assert (_opened(tmp_path / "kept", "weights A") / "measured-0.json").exists()
    assert [path.name for path in _opened(tmp_path / "kept", "weights B").iterdir()] == ["key"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen_image_edit_plus"], indirect=True, scope="session")
def test_model_for_editing_is_calibrated_on_instructions_for_built_in_pictures(
    kind: Kind, directory: Path, tmp_path: Path
) -> None:
    (tmp_path / kind.model).mkdir()
    (tmp_path / kind.model / "manifest.json").write_text(
        json.dumps({"license": "mit", "defaults": {**kind.defaults, "height": 64, "width": 64}})
    )
    instructions = ["a red circle", "the small green triangle", "blue"] * 6
    path = calibrate_model(directory, instructions, device="cpu", router_weights=tmp_path)
    measured = json.loads(path.read_text())["measured"]
    assert measured["num_samples"] == 2
    [card] = load_engine([directory], device="cpu", router_weights=tmp_path).cards.values()
    assert card.rules == (FORECAST, "dense")
    requests = [_request(card, instruction, seed) for seed, instruction in enumerate(_default_samples(card, tmp_path))]
    assert len(requests) == 48
    edits = {request.edit for request in requests if isinstance(request, ImageRequest)}
    assert len(edits) == 48
    assert None not in edits
    assert card.curve_for(requests[0]) == card.curve
