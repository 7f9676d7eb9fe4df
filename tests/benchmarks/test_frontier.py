import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from benchmarks.frontier import __main__ as frontier_command
from benchmarks.frontier import comparison, peers
from benchmarks.frontier.bootstrap import Bootstrap, Measured, estimate, frontier, headline, time_for
from benchmarks.frontier.measurement import count_flops
from benchmarks.frontier.records import Records, hash_of
from benchmarks.frontier.subjects import ImageSubject, MeshSubject, Prepare, load_subject
from tests.fixtures.engines import write_manifest
from tests.fixtures.tiny_flux import tiny_flux, tiny_schnell
from tests.fixtures.tiny_qwen_image import tiny_qwen_image

__all__ = ["tiny_flux", "tiny_qwen_image", "tiny_schnell"]

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
FLUX, HUNYUAN = CHECKPOINTS / "tiny-flux", CHECKPOINTS / "tiny-hunyuan3d"
STEPS = 12
SIDE = 64


def measured(quality: Sequence[float], times: Sequence[float]) -> Measured:
    return Measured(np.array(quality), np.array(times))


def test_interval_of_a_mean_is_that_of_the_normal_distribution() -> None:
    quality = np.random.default_rng(1).normal(0.9, 0.05, 400)
    mean = estimate(*Bootstrap(400, 4000).mean_quality(measured([*quality], [1.0])))
    assert mean.value == quality.mean()
    error = 1.96 * quality.std() / 20
    assert (mean.low, mean.high) == pytest.approx((mean.value - error, mean.value + error), abs=0.1 * error)


def test_tenth_percentile_follows_the_worst_prompts() -> None:
    value, resampled = Bootstrap(20).tenth_percentile(measured([0.5] * 4 + [1.0] * 16, [1.0]))
    assert value == 0.5
    assert set(resampled) > {0.5, 1.0}


def test_median_time_is_resampled_over_rounds() -> None:
    value, resampled = Bootstrap(2).median_time(measured([1, 1], [0.2, 0.3, 0.9]))
    assert value == 0.3
    assert set(resampled) == {0.2, 0.3, 0.9}


def test_frontier_has_the_settings_that_none_beats_and_the_stock_loop() -> None:
    times, qualities = frontier(np.array([0.5, 0.3, 0.4, 0.5, 1.2]), np.array([0.98, 0.9, 0.85, 0.97, 0.99]))
    assert times.tolist() == [0.3, 0.5, 1.0]
    assert qualities.tolist() == [0.9, 0.98, 1.0]


def test_time_for_a_quality_lies_on_a_line_between_settings() -> None:
    times = time_for(np.array([0.5, 0.3]), np.array([0.98, 0.9]), [1.0, 0.99, 0.98, 0.94, 0.9, 0.5])
    assert times == pytest.approx([1.0, 0.75, 0.5, 0.4, 0.3, 0.3])


def test_headline_compares_with_ours_and_marks_bounds() -> None:
    rng = np.random.default_rng(0)
    qualities = [*rng.uniform(0.93, 0.97, 40)]
    rows = headline(
        {"ours": [measured(qualities, [0.3])], "peer": [measured(qualities, [0.6])]}, ours="ours", num_prompts=40
    )
    own = {row["quality"]: row for row in rows if row["contender"] == "ours"}
    peer = {row["quality"]: row for row in rows if row["contender"] == "peer"}
    assert all(row["over_ours"] == row["over_ours_low"] == row["over_ours_high"] == 1 for row in own.values())
    assert peer[0.94]["over_ours"] == pytest.approx(2)
    assert own[0.94]["is_upper_bound"]
    assert not own[0.97]["is_upper_bound"]
    assert 0.3 < float(own[0.97]["time_low"] or 0) < float(own[0.97]["time"] or 0) < float(own[0.97]["time_high"] or 0)


def test_records_are_read_back_and_the_last_line_of_a_key_counts(tmp_path: Path) -> None:
    key = {"model": "m", "setting": "a"}
    records = Records(tmp_path / "new" / "records.jsonl")
    records.add(key, {"quality": [0.5]})
    records.add(key, {"quality": [0.75]})
    again = Records(records.path)
    assert again.get({"setting": "a", "model": "m"}) == {"quality": [0.75]}
    assert again.get(key | {"setting": "b"}) is None


def test_hash_follows_weights_and_settings_and_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = hash_of(tmp_path)
    (tmp_path / "card.md").write_text("text")
    assert hash_of(tmp_path) == before
    (tmp_path / "calibration.json").write_text("{}")
    assert hash_of(tmp_path) != before


@cache
def subject_of(directory: Path) -> ImageSubject | MeshSubject:
    torch.set_num_threads(1)
    routers = directory.parent / "none"
    if directory.parent != CHECKPOINTS:
        routers = directory.parent / "routers"
        defaults = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "height": SIDE, "width": SIDE}
        write_manifest(routers / directory.name, defaults)
    return load_subject(directory, routers)


def requests_of(subject: ImageSubject | MeshSubject, count: int, num_steps: int) -> list[Any]:
    requests = subject.requests(count, SIDE if isinstance(subject, ImageSubject) else None)
    return [replace(request, num_inference_steps=num_steps) for request in requests]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in DPMSolverMultistepScheduler
@pytest.mark.parametrize("model", ["tiny_flux", "tiny_schnell", "tiny_qwen_image", "hunyuan3d"])
@pytest.mark.long
def test_solver_of_first_order_is_eulers(
    model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a wrong shift, sign or time it would not be."""
    subject = subject_of(HUNYUAN if model == "hunyuan3d" else request.getfixturevalue(model))
    requests = requests_of(subject, 1, STEPS)
    euler = subject.stock()(requests)()
    monkeypatch.setitem(peers._FLOW, "solver_order", 1)
    monkeypatch.setattr(peers, "_FIRST_SIGMA", 1 - 1e-6)
    first_order = peers.solver_steps(subject, (DPMSolverMultistepScheduler, STEPS))(requests)()
    torch.testing.assert_close(first_order, euler, rtol=1e-3, atol=1e-3)
    assert distance(peers.fewer_steps(subject, STEPS // 2)(requests)(), euler) > 0.01


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.long
def test_solvers_with_many_steps_give_what_many_steps_of_euler_give() -> None:
    subject = subject_of(FLUX)
    requests = subject.requests(1)
    limit = peers.fewer_steps(subject, 100)(requests)()
    few = distance(peers.fewer_steps(subject, 10)(requests)(), limit)
    for solver in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        assert distance(peers.solver_steps(subject, (solver, 50))(requests)(), limit) < few / 3


CACHES: dict[str, tuple[Callable[[Any, Any], Prepare], Any]] = {
    "FirstBlockCache": (peers.first_block_cache, 2.0),
    "SeaCache": (peers.sea_cache, (1.0, 3)),
    "MagCache": (peers.mag_cache, (1.0, 3, 0.2)),
    "TaylorSeer": (peers.taylorseer, (False, 3, 1)),
    "TaylorSeer lite": (peers.taylorseer, (True, 3, 1)),
}


@pytest.mark.parametrize("name", [*CACHES])
@pytest.mark.parametrize("model", ["tiny_flux", "tiny_qwen_image"])
@pytest.mark.long
def test_caches_save_work_and_forget_between_prompts(
    model: str, name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = subject_of(request.getfixturevalue(model))
    assert isinstance(subject, ImageSubject)
    first, second = requests_of(subject, 2, STEPS)
    attach, setting = CACHES[name]
    # MagCache is calibrated, and takes its number of steps, at the card's defaults.
    monkeypatch.setattr(subject, "card", replace(subject.card, default_num_inference_steps=STEPS))
    monkeypatch.setattr(subject, "calibration_requests", lambda count: requests_of(subject, count, STEPS))
    prepare = attach(subject, setting)
    dense, alone = subject.stock()([second])(), attach(subject, setting)([second])()
    prepare([first])()
    after: Tensor = prepare([second])()
    torch.testing.assert_close(after, alone)
    assert not torch.allclose(after, dense, rtol=1e-4, atol=1e-4)
    assert count_flops(prepare([second])) < 0.9 * count_flops(subject.stock()([second]))


@pytest.mark.slow
@pytest.mark.long
def test_command_measures_once_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each contender in a process of its own, cache-dit's too if it is installed; a second run has nothing to do."""
    has_peers = importlib.util.find_spec("cache_dit") is not None
    routers = tmp_path / "routers"
    defaults = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "height": SIDE, "width": SIDE}
    write_manifest(routers / FLUX.name, defaults)
    sizes = {"--prompts": 2, "--rounds": 1}
    names = ["--contenders", "fewer steps", "DBCache"]
    files = {"--router-weights": routers, "--out": tmp_path / "runs", "--json": tmp_path / "result.json"}
    if has_peers:
        files["--plot"] = tmp_path / "plot.svg"
    options = [str(part) for option in {**sizes, **files}.items() for part in option]
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")  # the command sets it, but a test must not keep it
    monkeypatch.setattr(sys, "argv", ["frontier", "--model", str(FLUX), "--batches", "1", "2", *options, *names])
    frontier_command.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = result["models"][FLUX.name]
    rows = {(row["contender"], row["setting"]): row for row in found["settings"]}
    half = rows["fewer steps", "6 steps"]
    assert half["compute"] == pytest.approx(0.5, abs=0.01)
    assert 0.2 < half["time"] < 0.9
    assert half["p10"] <= half["quality"] <= 1
    assert half["time_batch_2"] > 0
    assert {name for name, _ in rows} == {"fewer steps"} | ({"DBCache"} if has_peers else set())
    assert ("DBCache" in found["left_out"]) is not has_peers
    assert {row["contender"] for row in found["headline"]} == {name for name, _ in rows}
    assert json.loads((tmp_path / "result.json").read_text()) == result
    if has_peers:
        assert rows["DBCache", "threshold 0.8 reuses 8"]["compute"] < 0.9
        assert "<svg" in (tmp_path / "plot.svg").read_text()

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(comparison, "run", refuse)
    frontier_command.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["models"] == result["models"]
