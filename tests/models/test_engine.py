"""The engine keeps its promises: exact is exact, companions do not matter, nothing leaks, work not done is not done."""

import copy
import json
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import models.zoo
from models.card import Edits, ImageCard
from models.curve import EXACT, ComputedSteps, CurvePoint, Preset
from models.engine import Engine
from models.errors import OutOfDeviceMemory, UnknownModel, WeightsError
from models.families.family import Family
from models.report import Decision
from models.request import Budget, ComputeBudget, GenerationRequest, PresetBudget, QualityBudget
from models.rules.dense import DensePolicy
from models.rules.router import RouterPolicy
from models.state import DenoiseState
from models.zoo import fixed_share, load_engine

Ask = Callable[..., GenerationRequest]
Guided = Callable[..., dict[str, Any]]
Edited = Callable[..., dict[str, Any]]
Denoise = Callable[..., DenoiseState]
StockResult = Callable[..., Any]

ROUTED = CurvePoint(RouterPolicy(0.3, 0.3, 2, width_bias=0.5), 0.5, 0.5, 0.5, 0.5)
FORECAST = CurvePoint(DensePolicy(), 0.5, 0.5, 0.5, 0.5, steps=ComputedSteps(3, 6))
FORECAST_ROUTED = replace(ROUTED, steps=ComputedSteps(4, 9))
REUSED = CurvePoint(RouterPolicy(reuse_band=1.0, max_reuses=2), 0.5, 0.5, 0.5, 0.5)


@pytest.mark.parametrize("budget", [PresetBudget(Preset.EXACT), QualityBudget(1.0), ComputeBudget(1.0)])
def test_every_way_to_ask_for_everything_is_exact(engine: Engine, ask: Ask, denoise: Denoise, budget: Budget) -> None:
    state = denoise(engine, ask(budget=budget))
    assert torch.equal(state.latents, denoise(engine, ask()).latents)
    assert state.summary().compute_ratio == 1


Visitor = tuple[GenerationRequest, CurvePoint | None]
ARRIVALS = [0, 3, 1, 0, 2, 5, 4, 2, 1, 3, 0, 2, 1]
COUNT = len(ARRIVALS)


@pytest.fixture(scope="module")
def visitors(ask: Ask, guided: Guided, edited: Edited, other_scale: Mapping[str, Any]) -> list[Visitor]:
    """Requests that have nothing in common but the model and the size."""
    longest = "a small red circle on the left a large blue square on the right the green triangle " * 2
    return [
        (ask(seed=0, num_inference_steps=4), None),
        (ask(seed=1, num_inference_steps=7, prompt=longest[:83]), ROUTED),
        (ask(seed=2, num_inference_steps=9, prompt="", **guided(longest[:-1], 2.5)), ROUTED),
        (ask(seed=3, num_inference_steps=5, prompt="the green triangle on the right", **other_scale), REUSED),
        (ask(seed=4, num_inference_steps=8, **guided("a large green triangle", 1.5)), REUSED),
        (ask(seed=5, num_inference_steps=6, prompt="blue circle", budget=ComputeBudget(0.45)), None),
        (ask(seed=6, num_inference_steps=3, prompt="red", budget=ComputeBudget(0.7), **guided("", 4.0)), None),
        (ask(seed=7, num_inference_steps=6, prompt="a large square", budget=PresetBudget(Preset.DRAFT)), None),
        (ask(seed=8, num_inference_steps=8, prompt="a square", **guided("a green triangle", 2.0)), FORECAST),
        (ask(seed=9, num_inference_steps=9, prompt="the red triangle"), FORECAST_ROUTED),
        (ask(seed=10, num_inference_steps=9, prompt="", **edited(0.8), **guided("a square", 2.5)), ROUTED),
        (ask(seed=11, num_inference_steps=9, **edited(0.8, has_mask=True), **guided("a circle", 2.0)), FORECAST),
        (ask(seed=12, num_inference_steps=6, prompt="red", **edited(0.9, 80, 96, has_mask=True)), REUSED),
    ]


@pytest.fixture(scope="module")
def alone(engine: Engine, denoise: Denoise, visitors: Sequence[Visitor]) -> list[DenoiseState]:
    """What each visitor gets when nobody else is there."""
    return [denoise(engine, request, point) for request, point in visitors]


def serve(engine: Engine, visitors: Sequence[Visitor], arrivals: Sequence[int]) -> list[DenoiseState]:
    """Step all visitors that are there in one batch; each joins at its turn and leaves when done."""
    states: dict[int, DenoiseState] = {}
    turn = 0
    while len(states) < len(visitors) or not all(state.is_done for state in states.values()):
        for i, (request, point) in enumerate(visitors):
            if arrivals[i] == turn:
                states[i] = engine.start(request, point)
        present = [state for state in states.values() if not state.is_done]
        if present:
            engine.step(present)
        turn += 1
    return [states[i] for i in range(len(visitors))]


def assert_same_results(together: Sequence[DenoiseState], alone: Sequence[DenoiseState]) -> None:
    for ours, expected in zip(together, alone, strict=True):
        assert ours.summary().decisions == expected.summary().decisions
        assert ours.spent_flops == pytest.approx(expected.spent_flops)
        torch.testing.assert_close(ours.latents, expected.latents, rtol=0, atol=1e-4)


def test_visitors_differ_in_what_they_do(alone: Sequence[DenoiseState]) -> None:
    """Else the tests below would prove little."""
    summaries = [state.summary() for state in alone]
    assert len({summary.compute_ratio for summary in summaries}) >= 7
    assert sum(summary.num_skipped > 0 for summary in summaries) >= 4
    assert sum(summary.num_reused > 0 for summary in summaries) >= 4
    assert sum(summary.mean_mlp_width < 1 for summary in summaries) >= 4
    assert sum(summary.num_steps_forecast > 0 for summary in summaries) >= 2
    for summary in summaries:
        if summary.rule == "router":
            by_step: dict[int, list[str]] = {}
            for entry in summary.decisions or ():
                by_step.setdefault(entry.step, []).append(f"{entry.branch} {entry.block} {entry.decision}")
            assert len({tuple(entries) for entries in by_step.values()}) > 1, "decisions should differ between steps"


@pytest.mark.parametrize("arrivals", [[0] * COUNT, ARRIVALS, [*range(COUNT)], [*range(COUNT)][::-1]])
def test_companions_change_neither_decisions_nor_results(
    engine: Engine, visitors: list[Visitor], alone: list[DenoiseState], arrivals: list[int]
) -> None:
    assert_same_results(serve(engine, visitors, arrivals), alone)


@settings(max_examples=4)
@given(order=st.permutations(range(COUNT)), arrivals=st.lists(st.integers(0, 6), min_size=COUNT, max_size=COUNT))
def test_companions_do_not_matter_in_any_order_of_arrival(
    engine: Engine, visitors: list[Visitor], alone: list[DenoiseState], order: list[int], arrivals: list[int]
) -> None:
    together = serve(engine, [visitors[i] for i in order], arrivals)
    assert_same_results(together, [alone[i] for i in order])


def test_dropped_companion_changes_nothing_for_the_others(
    engine: Engine, visitors: list[Visitor], alone: list[DenoiseState]
) -> None:
    states = [engine.start(request, point) for request, point in visitors]
    for _ in range(2):
        engine.step(states)
    stay = [i for i in range(COUNT) if i not in (1, 4, 11)]
    while present := [states[i] for i in stay if not states[i].is_done]:
        engine.step(present)
    assert_same_results([states[i] for i in stay], [alone[i] for i in stay])


@pytest.mark.parametrize("number", range(COUNT))
def test_request_gets_the_same_bits_every_time(
    engine: Engine, denoise: Denoise, visitors: list[Visitor], alone: list[DenoiseState], number: int
) -> None:
    assert torch.equal(denoise(engine, *visitors[number]).latents, alone[number].latents)


def test_request_after_a_finished_and_a_dropped_one_equals_that_on_a_fresh_engine(
    engine: Engine, directory: Path, router_weights: Path, denoise: Denoise, visitors: list[Visitor]
) -> None:
    fresh = load_engine([directory], device="cpu", router_weights=router_weights)
    denoise(engine, *visitors[2])
    dropped = [engine.start(*visitors[number]) for number in (4, 11)]
    for _ in range(3):
        engine.step(dropped)
    for visitor in (visitors[1], visitors[3], visitors[10], visitors[12]):
        assert torch.equal(denoise(engine, *visitor).latents, denoise(fresh, *visitor).latents)


def tensors_of(state: DenoiseState) -> list[Tensor]:
    """Without its noise levels: the scheduler, a calculator that all requests use, keeps those it computed last."""
    tensors = [t for t in (state.latents, state.prediction) if t is not None]
    tensors += [t for velocity in state.velocities for t in velocity if t is not None]
    tensors += [state.kept.changes, state.kept.image_latents, state.kept.noise] if state.kept else []
    tensors += [t for i in state.inputs for t in (i.context, i.pooled, i.guidance) if t is not None]
    tensors += [i.references.latents for i in state.inputs if i.references]
    residuals = [residual for row in state.rows for residual in row.residuals.values()]
    return tensors + [t for residual in residuals for t in (residual.hidden_states, residual.encoder_hidden_states)]


@pytest.mark.parametrize("number", [2, 4, 8, 11], ids=["router", "re-use", "forecast", "edit"])
def test_nothing_of_a_finished_or_dropped_request_lives_on(
    engine: Engine, model: str, visitors: list[Visitor], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even until the next garbage collection: device memory is needed at once."""
    monkeypatch.setattr(engine._families[model], "prompt_cache", None, raising=False)
    finished, dropped = engine.start(*visitors[number]), engine.start(*visitors[number])
    for _ in range(2):
        engine.step([finished, dropped])
    engine.preview(dropped)()
    traces = [weakref.ref(tensor) for state in (finished, dropped) for tensor in tensors_of(state)]
    assert len(traces) > 2 * 4
    while not finished.is_done:
        engine.step([finished])
    left = tensors_of(finished)
    assert [id(tensor) for tensor in left] == [
        id(finished.latents),
        id(finished.prediction),
    ]  # it may wait for its file
    del left
    engine.finish(finished)
    del finished, dropped
    assert [tensor.shape for trace in traces if (tensor := trace()) is not None] == []


def test_state_holds_no_memory_of_its_companions(engine: Engine, visitors: list[Visitor]) -> None:
    states = [engine.start(request, point) for request, point in visitors]
    for _ in range(2):
        engine.step(states)
    for state in states:
        for tensor in tensors_of(state):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def modules_of(kind: Any, family: Family) -> dict[str, nn.Module]:
    twins = {f"{block.name} at {width}": module for block in family.blocks for width, module in block.variants.items()}
    assert family.routers is not None
    return {**twins, **kind.modules(family), "routers": family.routers}


def held_by(module: nn.Module) -> dict[str, int]:
    """Its attributes, and how many tensors each of them holds."""
    return {
        name: sum(isinstance(part, Tensor) for part in (value if isinstance(value, list) else [value]))
        for name, value in vars(module).items()
    }


def test_serving_changes_no_module(
    kind: Any, open_engine: Engine, family: Family, ask: Ask, denoise: Denoise, visitors: list[Visitor]
) -> None:
    modules = modules_of(kind, family)
    open_engine.finish(
        denoise(open_engine, ask(num_inference_steps=1))
    )  # Qwen-Image's VAE has its counters from now on
    weights = {n: {k: v.clone() for k, v in module.state_dict().items()} for n, module in modules.items()}
    attributes = {n: [held_by(m) for m in module.modules()] for n, module in modules.items()}
    for state in serve(open_engine, visitors, [0] * COUNT):
        open_engine.finish(state)
    open_engine.preview(state)()
    for name, module in modules.items():
        assert [held_by(m) for m in module.modules()] == attributes[name]
        after = module.state_dict()
        assert after.keys() == weights[name].keys()
        assert all(torch.equal(after[key], value) for key, value in weights[name].items()), name


def test_routers_stand_beside_the_model(family: Family, stock: Any) -> None:
    ours, theirs = family.transformer.state_dict(), stock.transformer.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class BlockCalls:
    """Counts the rows that every block runs at every width, and notes the size of the MLP's hidden layer."""

    def __init__(self, family: Family) -> None:
        self.rows: dict[tuple[str, float], int] = {}
        self.num_calls = 0
        self._handles = [
            module.register_forward_pre_hook(self._counter(block.name, width), with_kwargs=True)
            for block in family.blocks
            for width, module in block.variants.items()
        ]

    def _counter(self, name: str, width: float) -> Callable[[nn.Module, Any, dict[str, Tensor]], None]:
        def count(module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
            self.num_calls += 1
            self.rows[name, width] = self.rows.get((name, width), 0) + len(kwargs["hidden_states"])

        return count

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.fixture
def calls(family: Family) -> Iterator[BlockCalls]:
    calls = BlockCalls(family)
    yield calls
    calls.remove()


def decided_rows(states: Sequence[DenoiseState]) -> dict[tuple[str, float], int]:
    rows: dict[tuple[str, float], int] = {}
    for state in states:
        for entry in state.summary().decisions or ():
            if entry.decision is Decision.RUN:
                rows[entry.block, entry.mlp_width] = rows.get((entry.block, entry.mlp_width), 0) + 1
    return rows


def test_blocks_see_exactly_the_rows_that_run_at_their_width(
    open_engine: Engine, calls: BlockCalls, visitors: list[Visitor]
) -> None:
    states = serve(open_engine, visitors, ARRIVALS)
    assert calls.rows == decided_rows(states)


@pytest.mark.parametrize(
    "point", [EXACT, ROUTED, REUSED, FORECAST, FORECAST_ROUTED], ids=["exact", "routed", "reused", "forecast", "both"]
)
@pytest.mark.parametrize("is_edit", [False, True], ids=["generation", "edit"])
def test_compute_ratio_is_what_torch_counts_in_the_blocks(
    family: Family, engine: Engine, ask: Ask, guided: Guided, edited: Edited, point: CurvePoint, is_edit: bool
) -> None:
    """Both prompts have as many tokens, so nothing is padded: padding is multiplied too, but is on nobody's account."""
    counted = 0.0

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted_call(*args: Any) -> Any:
            nonlocal counted
            # Torch counts attention by its parts; the fused kernel of a CPU it does not know.
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                result = call(*args)
            counted += counter.get_total_flops()
            return result

        return counted_call

    watched = copy.copy(family)
    watched.blocks = tuple(
        replace(block, call=counting(block.call), enter=counting(block.enter) if block.enter else None)
        for block in family.blocks
    )
    watched_engine = Engine({family.model_id: watched}, engine.cards)
    fields = edited(0.7, has_mask=True) if is_edit else {}
    request = ask(num_inference_steps=5, prompt="a large red circle", **guided("a large blue square"), **fields)
    state = watched_engine.start(request, point)
    while not state.is_done:
        watched_engine.step([state])
    assert state.spent_flops == pytest.approx(counted, rel=0.01)
    assert state.summary().compute_ratio == pytest.approx(counted / (state.num_steps * state.dense_flops), rel=0.01)
    assert point is EXACT or state.summary().compute_ratio < 0.95


def test_block_that_nobody_runs_is_not_called(open_engine: Engine, calls: BlockCalls, ask: Ask) -> None:
    state = open_engine.start(ask(), CurvePoint(RouterPolicy(skip_threshold=1.1), 0.0, 0.0, 0.0, 0.0))
    report = open_engine.step([state])
    assert calls.num_calls == 0
    assert [block.num_skipped for block in report.blocks] == [1] * len(open_engine.cards[state.request.model].blocks)
    unavoidable = sum(cost.always for cost in state.rows[0].costs.values())
    assert state.summary().compute_ratio == unavoidable / state.dense_flops < 0.1


def test_reused_blocks_are_not_called(open_engine: Engine, calls: BlockCalls, ask: Ask) -> None:
    everything = CurvePoint(RouterPolicy(0.0, 1.0, 2, width_bias=-1e6), 0.0, 0.0, 0.0, 0.0)
    state = open_engine.start(ask(num_inference_steps=6), everything)
    num_calls = []
    for _ in range(6):
        before = calls.num_calls
        open_engine.step([state])
        num_calls.append(calls.num_calls - before)
    all_blocks = len(open_engine.cards[state.request.model].blocks)
    assert num_calls == [all_blocks, 0, 0, all_blocks, 0, 0]


def test_step_report_tells_what_the_rows_did(open_engine: Engine, visitors: list[Visitor]) -> None:
    states = [open_engine.start(request, point) for request, point in visitors]
    open_engine.step(states)
    report = open_engine.step(states)
    entries = [e for state in states for e in state.summary().decisions or () if e.step == state.computed[1]]
    assert report.batch_size == COUNT
    assert 0 < report.router_seconds < report.seconds
    for block in report.blocks:
        mine = [entry for entry in entries if entry.block == block.block]
        counted = [sum(entry.decision is decision for entry in mine) for decision in Decision]
        assert [block.num_run, block.num_skipped, block.num_reused, 0] == counted
        assert sorted(block.mlp_widths) == sorted(e.mlp_width for e in mine if e.decision is Decision.RUN)
    went_on = [state.step_index - state.computed[1] - 1 for state in states]
    assert report.num_forecast == sum(went_on) > 0
    assert report.num_forecast_rows == sum(n * len(s.rows) for n, s in zip(went_on, states, strict=True))


@pytest.mark.parametrize(
    "point",
    [
        EXACT,
        CurvePoint(RouterPolicy(skip_threshold=0.3), 0.5, 0.5, 0.5, 0.5),
        CurvePoint(RouterPolicy(skip_threshold=0.3, reuse_band=0.3), 0.5, 0.5, 0.5, 0.5),
    ],
    ids=["exact", "no band", "no re-use"],
)
def test_no_residual_is_kept_that_the_policy_cannot_use(engine: Engine, ask: Ask, point: CurvePoint) -> None:
    state = engine.start(ask(), point)
    while not state.is_done:
        engine.step([state])
        assert [row.residuals for row in state.rows] == [{}]


@pytest.mark.parametrize("point", [ROUTED, REUSED], ids=["router", "re-use"])
def test_last_step_leaves_no_residual(engine: Engine, ask: Ask, point: CurvePoint) -> None:
    state = engine.start(ask(num_inference_steps=5), point)
    while not state.is_done:
        engine.step([state])
    assert [row.residuals for row in state.rows] == [{}]


class HostReads(TorchFunctionMode):
    """Counts what would make the host wait for a device. (On a CPU such reads dispatch no operator of their own.)"""

    NAMES = frozenset(
        ("tolist", "item", "cpu", "numpy", "nonzero", "is_nonzero", "__bool__", "__float__", "__int__", "__index__")
    )

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_reads += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


def test_host_reads_are_noticed() -> None:
    with HostReads() as reads:
        torch.ones(2).tolist(), torch.ones(1).item(), bool(torch.ones(1)), float(torch.ones(1))
    assert reads.num_reads >= 4


@pytest.mark.parametrize("rules", [["dense"], ["router"], ["dense", "router"]])
def test_host_waits_at_most_once_a_block(
    kind: Any, engine: Engine, model: str, visitors: list[Visitor], rules: Sequence[str]
) -> None:
    """And once in each call of a block with experts. Exact states have calls of their own."""
    most = len(engine.cards[model].blocks) * ("router" in rules)
    states = [engine.start(request, point) for request, point in visitors]
    states = [state for state in states if state.point.rule in rules]
    for _ in range(3):
        num_exact = sum(state.is_exact for state in states)
        with HostReads() as reads:
            report = engine.step(states)
        num_expert_calls = sum(len({*b.mlp_widths}) + num_exact for b in report.blocks if b.block in kind.expert_blocks)
        assert reads.num_reads <= most + num_expert_calls


def test_step_that_failed_can_be_repeated(
    open_engine: Engine, family: Family, visitors: list[Visitor], alone: list[DenoiseState]
) -> None:
    def run_out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    states = [open_engine.start(request, point) for request, point in visitors]
    open_engine.step(states)
    handles = [module.register_forward_hook(run_out_of_memory) for module in family.blocks[4].variants.values()]
    with pytest.raises(OutOfDeviceMemory):
        open_engine.step(states)
    for handle in handles:
        handle.remove()
    while present := [state for state in states if not state.is_done]:
        open_engine.step(present)
    assert_same_results(states, alone)


def test_point_given_overrides_a_compute_budget(engine: Engine, ask: Ask, denoise: Denoise) -> None:
    capped, uncapped = ask(budget=ComputeBudget(0.3)), ask()
    assert torch.equal(denoise(engine, capped, ROUTED).latents, denoise(engine, uncapped, ROUTED).latents)


def test_router_logits_of_any_size_are_decided(family: Family, open_engine: Engine, ask: Ask) -> None:
    assert family.routers is not None
    bias = family.routers.get_parameter("gate_mlps.0.out.2.bias")
    before = bias.clone()
    state = open_engine.start(ask(), ROUTED)
    try:
        bias.fill_(-1000.0)
        open_engine.step([state])
    finally:
        bias.copy_(before)
    decisions = state.summary().decisions
    assert decisions is not None
    assert decisions[0].decision is Decision.SKIP


def test_card_tells_what_routers_and_curve_allow(kind: Any, engine: Engine, family: Family, model: str) -> None:
    card = engine.cards[model]
    assert (card.id, card.modality, card.license) == (model, kind.modality, "apache-2.0")
    assert (card.default_num_inference_steps, card.default_guidance_scale) == (4, 2.5)
    assert card.rules == ("dense", "router")
    assert card.blocks == tuple(block.name for block in family.blocks)
    assert [point.preset for point in card.curve] == [Preset.EXACT, Preset.HIGH, Preset.BALANCED, Preset.DRAFT]
    assert 0 < card.dense_step_seconds < 60
    assert 0 <= card.fixed_share <= 1
    assert 0 < card.encode_seconds < 60
    assert not isinstance(card, ImageCard) or 0 < card.decode_seconds < 60
    if isinstance(card, ImageCard) and card.edits is Edits.NOISED:
        assert 0 < card.picture_seconds < 60


@pytest.mark.parametrize(("pair_s", "share"), [(1.5, 0.5), (1.0, 1.0), (2.0, 0.0), (0.9, 1.0), (2.3, 0.0)])
def test_fixed_share_is_the_time_that_a_second_request_does_not_add(pair_s: float, share: float) -> None:
    assert fixed_share(1.0, pair_s) == pytest.approx(share)


def test_card_tells_how_much_of_a_step_a_batch_shares(
    directory: Path, router_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models.zoo, "_dense_step_seconds", lambda *_: (1.0, 1.5))
    [card] = load_engine([directory], device="cpu", router_weights=router_weights).cards.values()
    assert (card.dense_step_seconds, card.fixed_share) == (1.0, 0.5)


def test_card_of_a_model_without_routers(plain_engine: Engine, model: str) -> None:
    card = plain_engine.cards[model]
    assert card.license == "mit"
    assert card.rules == ("dense",)
    assert card.curve == (EXACT,)


def test_unknown_model_is_refused_with_those_there_are(engine: Engine, model: str, ask: Ask) -> None:
    with pytest.raises(UnknownModel, match=f"'other' is not loaded; loaded: {model}"):
        engine.start(ask(model="other"))


def test_directory_that_is_no_pipeline_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("missing", "empty"):
        with pytest.raises(WeightsError, match=rf"{name} is no model directory"):
            load_engine([tmp_path / name], device="cpu", router_weights=tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            '{"_class_name": "StableDiffusionPipeline"}',
            "the class StableDiffusionPipeline; served are: FluxPipeline, FluxKontextPipeline, QwenImagePipeline, "
            "QwenImageEditPipeline, QwenImageEditPlusPipeline",
        ),
        ("{}", "model_index.json"),
        ("{", "model_index.json"),
    ],
    ids=["another class", "no class", "no JSON"],
)
def test_directory_of_another_kind_is_refused(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(WeightsError, match=message):
        load_engine([tmp_path], device="cpu", router_weights=tmp_path)


def test_model_directory_without_its_transformer_is_refused(
    kind: Any, directory: Path, model: str, tmp_path: Path
) -> None:
    incomplete = Path(shutil.copytree(directory, tmp_path / model))
    (incomplete / kind.transformer_file).unlink()
    with pytest.raises(WeightsError, match=model):
        load_engine([incomplete], device="cpu", router_weights=tmp_path)


def test_curve_and_manifest_are_read_without_routers(
    directory: Path, router_weights: Path, model: str, tmp_path: Path
) -> None:
    """A model may be elastic by forecast steps alone."""
    folder = Path(shutil.copytree(router_weights / model, tmp_path / model))
    (folder / "router.safetensors").unlink()
    content = json.loads((folder / "calibration.json").read_text())
    content["curve"] = content["curve"][:1]
    (folder / "calibration.json").write_text(json.dumps(content))
    card = load_engine([directory], device="cpu", router_weights=tmp_path).cards[model]
    assert card.license == "apache-2.0"
    assert card.rules == ("dense",)
