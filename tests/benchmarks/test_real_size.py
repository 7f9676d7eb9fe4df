import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import real_size
from benchmarks.real_size import (
    SHARES,
    ForcedRule,
    counted_waits,
    forced_plans,
    measure,
    start,
)
from benchmarks.real_size_models import MODELS, Scale, Subject
from models.elastic.compute import BlockCost
from models.elastic.plan import REUSE, Policy, RowView
from models.engine import Engine
from models.report import Decision

SMALL = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 48, "axes_dims_rope": (4, 6, 6)}
TINY = {
    "flux": Scale(
        {**SMALL, "guidance_embeds": True, "pooled_projection_dim": 24, "num_layers": 2, "num_single_layers": 3},
        {"cond": 7},
        (64,),
        (1, 2),
    ),
    "qwen-image": Scale({**SMALL, "num_layers": 5}, {"cond": 9, "uncond": 3}, (64,), (1, 2)),
}
COLUMNS = [
    "name",
    "compute_ratio",
    "seconds",
    "time_ratio",
    "low",
    "high",
    "per_compute",
    "router_share",
    "gather_cost",
    "waits",
    "peak_gib",
    "bank_gib",
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=[*TINY])
def subject(request: pytest.FixtureRequest) -> Subject:
    return MODELS[request.param].build(TINY[request.param], torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("num_blocks", [57, 60])
def test_forced_plans_leave_the_share_in_the_stated_mix(share: float, num_blocks: int) -> None:
    # Nearly those of FLUX.1-dev at 1024x1024, with cheaper blocks from the 20th on.
    costs = [BlockCost(1.2, 0.7) if i < 19 else BlockCost(0.7, 0.9) for i in range(num_blocks)]
    dense = sum(cost.dense for cost in costs)
    saved = dict.fromkeys(Decision, 0.0)
    for plan, cost in zip(forced_plans(costs, share), costs, strict=True):
        left = cost.at_width(plan.mlp_width) if plan.decision is Decision.RUN else 0.0
        saved[plan.decision] += (cost.dense - left) / dense
    assert sum(saved.values()) == pytest.approx(1 - share, abs=0.01)
    assert saved[Decision.SKIP] == pytest.approx(0.4 * (1 - share), abs=0.03)
    assert saved[Decision.REUSE] == pytest.approx(0.4 * (1 - share), abs=0.03)
    assert saved[Decision.RUN] == pytest.approx(0.2 * (1 - share), abs=0.03)


def test_forced_reuse_runs_where_nothing_is_stored() -> None:
    view = RowView(0, 8, 0, 0.5, (0.0,) * 4, None, 1)
    first = ForcedRule([REUSE]).plan(view, Policy())
    assert first.decision is Decision.RUN
    assert first.keeps_residual
    assert ForcedRule([REUSE]).plan(replace(view, num_reuses=0), Policy()) == REUSE


def test_stock_steps_and_our_exact_step_agree(subject: Subject) -> None:
    ours = start(subject, 64, 2)
    stock: dict[str, list[Tensor]] = {name: step(ours) for name, step in subject.stock_steps.items()}
    Engine({subject.family.model_id: subject.family}, {}).step(ours)
    for latents in stock.values():
        for state, expected in zip(ours, latents, strict=True):
            torch.testing.assert_close(state.latents, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[0].latents, start(subject, 64, 1)[0].latents, atol=1e-3)


def test_measurement_counts_compute_waits_and_stored_residuals(subject: Subject) -> None:
    rows = {str(row["name"]): row for row in measure(subject, 64, 2, num_rounds=1)}
    num_blocks = len(subject.family.blocks)
    assert all([*row] == COLUMNS for row in rows.values())
    assert rows["exact"]["compute_ratio"] == rows["routers"]["compute_ratio"] == rows["stock"]["compute_ratio"] == 1
    assert rows["exact"]["waits"] == rows["stock"]["waits"] == 0
    assert rows["exact"]["bank_gib"] == rows["routers"]["bank_gib"] == 0
    assert rows["routers"]["waits"] == num_blocks
    for share in SHARES:
        for kind in ("equal", "mixed"):
            row = rows[f"{share} {kind}"]
            assert row["compute_ratio"] == pytest.approx(share, abs=0.15)  # blocks are few
            assert row["waits"] == num_blocks
            assert 0 < float(row["bank_gib"] or 0) < 1e-3
        assert rows[f"{share} equal"]["gather_cost"] is None
        assert isinstance(rows[f"{share} mixed"]["gather_cost"], float)


def test_waits_on_a_cpu_are_calls_that_read_a_tensor() -> None:
    tensor = torch.arange(2)
    with counted_waits(torch.device("cpu")) as waits:
        assert tensor.tolist() == [0, 1]
        assert tensor[1].item() == 1
    tensor.tolist()
    assert waits == ["tolist", "item"]


def test_command_ends_in_one_line_of_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny = {name: replace(model, reduced=TINY[name]) for name, model in MODELS.items()}
    monkeypatch.setattr(real_size, "MODELS", tiny)
    path = tmp_path / "results" / "real.json"
    command = f"real_size --device cpu --reduced --rounds 1 --batches 1 --json {path}"
    monkeypatch.setattr("sys.argv", command.split())
    real_size.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(path.read_text())
    assert {step["model"] for step in result["steps"]} == set(MODELS)
    assert {step["side"] for step in result["steps"]} == {64}
