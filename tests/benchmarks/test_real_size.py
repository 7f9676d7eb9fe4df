import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.real_size import __main__ as real_size
from benchmarks.real_size import sections, subjects
from benchmarks.real_size.device_use import host, memory
from benchmarks.real_size.meshes import meshes
from benchmarks.real_size.section import Section, Setting, Table
from benchmarks.real_size.steps import SHARES, ForcedRule, Runner, Way, forced_plans
from benchmarks.real_size.subjects import IMAGE_MODELS, Scale, Subject
from models.elastic.compute import BlockCost
from models.elastic.plan import REUSE, Policy, RowView
from models.report import Decision

SMALL = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 48, "axes_dims_rope": (4, 6, 6)}
TINY = {
    "flux": Scale(
        {**SMALL, "guidance_embeds": True, "pooled_projection_dim": 24, "num_layers": 2, "num_single_layers": 3},
        {**subjects._FLUX_VAE, "block_out_channels": (32, 32, 32, 32)},
        {"cond": 7},
        (64,),
    ),
    "qwen-image": Scale({**SMALL, "num_layers": 5}, {"base_dim": 4}, {"cond": 9, "uncond": 3}, (64,)),
}


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    torch.set_num_threads(1)
    tiny = {name: replace(model, reduced=TINY[name]) for name, model in IMAGE_MODELS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.real_size.section.IMAGE_MODELS", tiny)
        patch.setattr(sections, "_MOST_ROUNDS", 1)
        yield


@pytest.fixture(scope="module", params=[*TINY])
def subject(request: pytest.FixtureRequest) -> Subject:
    return IMAGE_MODELS[request.param].build(TINY[request.param], torch.device("cpu"), torch.float32)


@pytest.fixture
def setting() -> Setting:
    return Setting(torch.device("cpu"), torch.bfloat16, True, 0.0)


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


def test_ways_differ_as_they_say(subject: Subject) -> None:
    runner = Runner(subject)
    stock, _ = runner.denoise(Way(stock_steps=2), 64, 2, 2)
    exact, dense, equal, mixed = (
        runner.denoise(way, 64, 2, 2)
        for way in (Way(), Way(shares_calls=True), Way(share=0.5), Way(share=0.5, is_mixed=True))
    )
    alone, _ = runner.denoise(Way(stock_steps=2), 64, 1, 2)
    assert torch.equal(exact[0][:1], alone)
    for latents, cost in (exact, dense):
        torch.testing.assert_close(latents, stock, rtol=1e-4, atol=1e-5)
        assert cost.compute_ratio == 1
    for latents, cost in (equal, mixed):
        assert cost.compute_ratio == pytest.approx(0.55, abs=0.15)  # blocks are few
        assert not torch.allclose(latents, stock, rtol=1e-2)
    assert not torch.equal(equal[0], mixed[0])


@pytest.mark.long
def test_savings_have_the_stated_shares(setting: Setting) -> None:
    for table in sections.savings(setting):
        rows = {str(row["name"]): row for row in table.rows}
        assert rows["stock"]["time_ratio"] == rows["routers 1"]["compute_ratio"] == 1
        for share, steps in zip(SHARES, (6, 4, 3), strict=True):
            assert rows[f"forecasts {share}"]["compute_ratio"] == steps / 8
            assert rows[f"fewer steps {share}"]["compute_ratio"] == steps / 8
            assert rows[f"routers {share}"]["compute_ratio"] == pytest.approx(share, abs=0.15)


@pytest.mark.long
def test_sections_without_a_gpu_say_what_they_can(setting: Setting) -> None:
    (flux, _), (flux_bytes, _), (flux_overlap, _) = (
        [*section(setting)] for section in (host, memory, sections.overlap)
    )
    assert all(float(row["operators"] or 0) > 100 and row["kernels"] is None for row in flux.rows)
    assert all(float(row["formula_gib"] or 0) > 0 and row["measured_gib"] is None for row in flux_bytes.rows)
    assert flux_overlap.rows[-1]["decodings"]


@pytest.mark.long
def test_meshes_have_all_stages(setting: Setting) -> None:
    (table,) = meshes(setting)
    assert len(table.rows) == 5


def test_each_section_writes_its_file_and_a_fault_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(_: Setting) -> Iterator[Table]:
        yield Table("first", [{"name": "a", "seconds": 1.0}])
        raise ValueError("no kernel")

    def good(_: Setting) -> Iterator[Table]:
        yield Table("second", [{"name": "b", "seconds": 2.0}])

    known = (Section("broken", 1, broken), Section("good", 1, good), Section("not chosen", 1, broken))
    monkeypatch.setattr(real_size, "SECTIONS", known)
    monkeypatch.setattr("sys.argv", f"real_size --device cpu --sections good,broken --out {tmp_path}".split())
    with pytest.raises(SystemExit, match="fault"):
        real_size.main()
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert results.keys() == {"real-size-cpu-broken.json", "real-size-cpu-good.json"}
    assert results["real-size-cpu-broken.json"]["fault"] == "ValueError('no kernel')"
    assert [*results["real-size-cpu-broken.json"]["tables"]] == ["first"]
    assert results["real-size-cpu-good.json"]["fault"] is None
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == results["real-size-cpu-good.json"]
