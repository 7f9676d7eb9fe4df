"""`edit_blocks`: blocks and routers over many steps, run by our runner under the official policy.

Some requests do not depend on the official program's quirks; our results must equal their recordings. The others were
recorded with quirks: counters lag after a skipped block, a branch's bank is found by counting calls, one decision holds
for a whole batch, and state outlives a request. Our results must differ from these recordings exactly there.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic.compute import BlockCost
from models.elastic.plan import MLP_WIDTHS, Policy, RowPlan, RowView
from models.elastic.row import Allowance, Row
from models.elastic.runner import ElasticBlock, run_block
from models.elastic.streams import Streams
from models.families.qwen_image import adapter
from models.families.qwen_image.conversion import router_tensors
from models.families.qwen_image.pipeline import pad_prompts, set_activation
from models.families.qwen_image.streams import QwenImageStreams
from models.families.wrapping import elastic_blocks
from models.report import Decision, StepDecision
from models.rules import RULES
from models.rules.router import OFFICIAL, RouterPolicy
from models.weights import MlpActivation, RouterWeights, router_stack

NEAR: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}


@dataclass
class Watched:
    """The router rule; it records the views that it was given."""

    needs_scores: bool = True
    seen: list[RowView] = field(default_factory=list)

    def plan(self, row: RowView, policy: Policy) -> RowPlan:
        self.seen.append(row)
        return RULES["router"].plan(row, policy)


@dataclass(frozen=True)
class Model:
    transformer: QwenImageTransformer2DModel
    blocks: tuple[ElasticBlock, ...]
    modulation: nn.Linear
    grid: tuple[int, int]


@dataclass
class Branch:
    """A row with its outputs and decisions. Lists are indexed by step, then by block."""

    row: Row
    text: Tensor
    rule: Watched
    outputs: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)

    def call(self, step: int, block: int) -> tuple[RowView, StepDecision]:
        number = step * len(self.outputs[0]) + block
        return self.rule.seen[number], self.row.trace[number]


class Request:
    """One sample of a recorded case. `image` is `(steps, 1, tokens, channels)`, `temb` `(steps, 1, channels)`."""

    def __init__(self, recording: Any, case: str, model: Model, sample: int = 0) -> None:
        if case not in recording.settings["scenarios"]:
            pytest.skip(f"no scenario {case} was recorded")
        self.case, self.sample = case, slice(sample, sample + 1)
        self.scenario = recording.settings["scenarios"][case]
        self.policy = policy_of(self.scenario)
        inputs = self.scenario["inputs"].removesuffix("*")
        self.image = recording.tensors[f"{inputs}image"][:, self.sample]
        self.temb = recording.tensors[f"{inputs}temb"]
        self.num_steps = len(self.image)
        costs = {block.name: BlockCost(1, 1) for block in model.blocks}
        self.branches = {}
        for name in self.scenario["branches"]:
            rule, text = Watched(), recording.tensors[f"{inputs}text_{name}"][self.sample]
            row = Row(rule, self.policy, name, self.num_steps, costs)
            self.branches[name] = Branch(row, text, rule)


def policy_of(scenario: dict[str, Any]) -> RouterPolicy:
    limit = re.search(r"cache_max_use=(\d+)", scenario["description"])
    return replace(OFFICIAL, max_reuses=int(limit[1])) if limit else OFFICIAL


def denoise(model: Model, requests: Sequence[Request], delays: Sequence[int]) -> None:
    """Run requests together, each starting after its delay. Each step's inputs are given, so only rows carry state."""
    for turn in range(max(request.num_steps + delay for request, delay in zip(requests, delays, strict=True))):
        active = [
            (request, turn - delay, branch)
            for request, delay in zip(requests, delays, strict=True)
            if 0 <= turn - delay < request.num_steps
            for branch in request.branches.values()
        ]
        rows = [branch.row for _, _, branch in active]
        context, mask = pad_prompts([branch.text for _, _, branch in active])
        streams: Streams = QwenImageStreams(
            torch.cat([request.image[step] for request, step, _ in active]),
            context,
            torch.cat([request.temb[step] for request, step, _ in active]),
            *adapter.rotary_embedding(model.transformer, context.shape[1], *model.grid),
            mask,
            None if mask is None else [branch.text.shape[1] for _, _, branch in active],
        )
        modulations = model.modulation(F.silu(streams.temb)).chunk(len(model.blocks), dim=1)
        for request, step, branch in active:
            branch.row.begin_step(step, step + 1, request.policy, Allowance())
            branch.outputs.append([])
        for index, (block, modulation) in enumerate(zip(model.blocks, modulations, strict=True)):
            streams = run_block(block, index, streams, modulation, rows).streams
            for i, (_, _, branch) in enumerate(active):
                text = streams.encoder_hidden_states[i : i + 1, : branch.text.shape[1]]
                branch.outputs[-1].append((streams.hidden_states[i : i + 1], text))
        for row in rows:
            row.end_step()


@pytest.fixture(scope="module")
def recording(recorded: Callable[[str], Any]) -> Any:
    return recorded("edit_blocks")


@pytest.fixture(scope="module")
def model(recording: Any) -> Model:
    config = recording.settings["config"]
    transformer = QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=config["blocks"],
        attention_head_dim=config["dim"] // config["heads"],
        num_attention_heads=config["heads"],
        joint_attention_dim=4,
        axes_dims_rope=tuple(config["axes"]),
    )
    prefix = "transformer_blocks."
    weights = {key.removeprefix(prefix): t for key, t in recording.weights.items() if key.startswith(prefix)}
    transformer.transformer_blocks.load_state_dict(weights)
    set_activation(transformer.eval().requires_grad_(False), MlpActivation.GELU_SIGMOID)
    stack = router_stack(router_tensors(recording.weights))
    blocks = elastic_blocks(transformer, adapter, RouterWeights(stack))
    return Model(transformer, blocks, stack.fused_modulation(), tuple(config["grid"]))


@pytest.fixture(scope="module")
def calls(recording: Any) -> Callable[[str], dict[tuple[int, str, int], dict[str, Any]]]:
    """The trace of a case, by step, branch and block, in the order of the calls."""

    def calls(case: str) -> dict[tuple[int, str, int], dict[str, Any]]:
        trace = recording.settings["traces"][case]
        rows = [dict(zip(trace["columns"], row, strict=True)) for row in trace["rows"]]
        return {(row["step"], row["branch"], row["block"]): row for row in rows}

    return calls


def recorded_outputs(
    recording: Any, request: Request, branch: str, step: int, block: int
) -> tuple[Tensor, Tensor] | None:
    """Image and text of the request's sample after a block; None if nothing was recorded there."""
    image, text = (recording.tensors[f"out/{request.case}/{branch}/{name}"][step] for name in ("image", "text"))
    if request.scenario["per_block_outputs"]:
        return image[block][request.sample], text[block][request.sample]
    is_last = block == recording.settings["config"]["blocks"] - 1
    return (image[request.sample], text[request.sample]) if is_last else None


def assert_as_recorded(recording: Any, request: Request, calls: dict[tuple[int, str, int], dict[str, Any]]) -> None:
    """Compare every decision, width, probability and tensor with the recording."""
    assert len(calls) == sum(len(branch.row.trace) for branch in request.branches.values())
    for (step, name, block), call in calls.items():
        branch = request.branches[name]
        view, done = branch.call(step, block)
        prob = recording.tensors[f"out/{request.case}/{name}/prob"][step, block, request.sample]
        assert view.depth_prob == pytest.approx(prob.item(), abs=1e-5, rel=0)
        assert done.decision == call["decision"], (step, name, block)
        if done.decision is Decision.RUN:
            assert done.mlp_width == MLP_WIDTHS[call["width_idx"][request.sample.start]]
        if expected := recorded_outputs(recording, request, name, step, block):
            for ours, theirs in zip(branch.outputs[step][block], expected, strict=True):
                torch.testing.assert_close(ours, theirs, **NEAR)


def test_official_policy_is_that_of_the_recorded_program(recording: Any) -> None:
    cache = recording.settings["cache"]
    assert [OFFICIAL.skip_threshold, OFFICIAL.skip_threshold + OFFICIAL.reuse_band] == cache["band"]
    assert (OFFICIAL.reuse_from_step, OFFICIAL.max_reuses) == (cache["first_step_index"], cache["max_use"])


@pytest.mark.parametrize(
    ("prob", "decision"),
    [
        (float(np.nextafter(np.float32(0.5), np.float32(0))), Decision.SKIP),
        (0.5, Decision.REUSE),
        (float(np.float32(0.515)), Decision.REUSE),
        (0.515, Decision.REUSE),
        (float(np.nextafter(np.float32(0.515), np.float32(1))), Decision.RUN),
    ],
)
def test_official_band_includes_both_of_its_ends(prob: float, decision: Decision) -> None:
    """The official program compares a float32 probability, read as a Python float, with 0.5 and 0.515."""
    view = RowView(OFFICIAL.reuse_from_step, 30, 0, prob, (0.0, 0.0, 0.0, 1.0), 0, OFFICIAL.reuse_from_step + 1)
    assert RULES["router"].plan(view, OFFICIAL).decision is decision


@pytest.mark.parametrize("case", ["aligned_a", "aligned_b"])
def test_positions_are_those_of_the_recorded_program(recording: Any, model: Model, case: str) -> None:
    request = Request(recording, case, model)
    for name, branch in request.branches.items():
        image, text = adapter.rotary_embedding(model.transformer, branch.text.shape[1], *model.grid)
        for factors, key in ((image, "in/rope_img"), (text, f"in/{case}/rope_txt_{name}")):
            expected = torch.complex(recording.tensors[f"{key}_cos"], recording.tensors[f"{key}_sin"])
            torch.testing.assert_close(factors, expected)


@pytest.mark.parametrize("case", ["aligned_a", "aligned_b", "second_fresh"])
def test_request_alone_is_as_recorded(recording: Any, model: Model, calls: Callable[[str], Any], case: str) -> None:
    request = Request(recording, case, model)
    denoise(model, [request], [0])
    assert_as_recorded(recording, request, calls(case))


@pytest.mark.parametrize("delay", [0, 4], ids=["in step", "joining later"])
def test_requests_in_one_batch_are_as_recorded_alone(
    recording: Any, model: Model, calls: Callable[[str], Any], delay: int
) -> None:
    requests = [Request(recording, case, model) for case in ("aligned_a", "aligned_b", "second_fresh")]
    denoise(model, requests, [0, delay, 2 * delay])
    for request in requests:
        assert_as_recorded(recording, request, calls(request.case))


def test_request_after_another_is_as_if_alone(recording: Any, model: Model, calls: Callable[[str], Any]) -> None:
    """In the official program, the second request re-uses residuals of the first one from its first step on."""
    first, second = Request(recording, "cfg_unequal", model), Request(recording, "second_fresh", model)
    denoise(model, [first], [0])
    denoise(model, [second], [0])
    assert_as_recorded(recording, second, calls("second_fresh"))
    stale = calls("second_stale").items()
    leaks = [key for key, call in stale if call["decision"] == Decision.REUSE and key[0] < OFFICIAL.reuse_from_step]
    assert leaks
    for step, name, block in leaks:
        assert second.branches[name].call(step, block)[1].decision is not Decision.REUSE


QUIRKY = ["cfg_unequal", "cfg_equal", "no_cfg", "max_use2", "batch2"]


@pytest.mark.parametrize("case", [*QUIRKY, "aligned_a", "aligned_b", "second_fresh"])
def test_request_differs_from_the_record_only_where_a_quirk_decided(
    recording: Any, model: Model, calls: Callable[[str], Any], case: str
) -> None:
    batch = range(recording.settings["scenarios"].get(case, {"batch": 1})["batch"])
    requests = [Request(recording, case, model, sample) for sample in batch]
    denoise(model, requests, [0] * len(requests))
    quirks: Counter[str] = Counter()
    for request in requests:
        quirks += compare_up_to_quirks(recording, request, calls(case))
    if case not in QUIRKY:
        assert not quirks
    if len(requests) > 1:
        assert quirks["decided by the batch's mean"]


Entry = tuple[int, str, int]
"""A stored residual: the step and branch that wrote it, and how often it was used."""


def compare_up_to_quirks(
    recording: Any, request: Request, calls: dict[tuple[int, str, int], dict[str, Any]]
) -> Counter[str]:
    """Check every call of a request against a clean engine, and against the recording where no quirk decided.

    Every step's inputs are recorded. After a quirk, the computations differ until the end of the step, and wherever a
    residual of that time is used. Everywhere else, probabilities, widths, decisions and tensors must be as recorded.
    Returns the quirks that decided, counted.
    """
    policy, own_bank = request.policy, {"cond": 1, "uncond": 2}
    upper = policy.skip_threshold + policy.reuse_band
    ours: dict[tuple[int, str], Entry] = {}
    theirs: dict[tuple[int, int], Entry] = {}
    tainted: set[tuple[int, str]] = set()
    quirks: Counter[str] = Counter()
    has_parted = False
    for (step, name, block), call in calls.items():
        view, done = request.branches[name].call(step, block)
        assert view.depth_prob is not None
        assert view.width_logits is not None
        has_parted = has_parted and block > 0

        # The decision of a clean engine: by the sampler's step, the branch's own residual, the sample's own probability
        may_reuse, own = step >= policy.reuse_from_step, ours.get((block, name))
        clean = state_of(view.depth_prob, policy.skip_threshold, upper)
        if clean is Decision.REUSE and not (may_reuse and own and own[2] < policy.max_reuses):
            clean = Decision.RUN
        assert done.decision is clean, (step, name, block)

        # The decision of the official program, and its quirk
        bank = (block, call["bank"])
        if not has_parted:
            prob = recording.tensors[f"out/{request.case}/{name}/prob"][step, block, request.sample].item()
            assert view.depth_prob == pytest.approx(prob, abs=1e-5, rel=0)
            width = MLP_WIDTHS[call["width_router"][request.sample.start]]
            assert width == MLP_WIDTHS[view.width_logits.index(max(view.width_logits))]
            quirk = None
            if clean != call["decision"] or (clean is Decision.REUSE and theirs[bank][:2] != (own or ())[:2]):
                state = state_of(call["prob"], policy.skip_threshold, upper)
                if state is not state_of(view.depth_prob, policy.skip_threshold, upper):
                    quirk = "decided by the batch's mean"
                elif (call["step_index"] >= policy.reuse_from_step) is not may_reuse:
                    quirk = "caching began late"
                elif call["bank"] != own_bank[name]:
                    quirk = "took the other branch's bank"
                elif theirs.get(bank) != own:
                    quirk = "used a residual left by an earlier quirk"
            if quirk is None and (clean is not Decision.REUSE or (block, name) not in tainted):
                assert call["decision"] == clean, (step, name, block)
                if clean is Decision.RUN:
                    assert done.mlp_width == width
                if expected := recorded_outputs(recording, request, name, step, block):
                    for mine, recorded in zip(request.branches[name].outputs[step][block], expected, strict=True):
                        torch.testing.assert_close(mine, recorded, **NEAR)
            else:
                has_parted = True
                quirks[quirk or "tainted residual"] += 1

        if clean is Decision.RUN and may_reuse:
            ours[block, name] = (step, name, 0)
            (tainted.add if has_parted else tainted.discard)((block, name))
        elif clean is Decision.REUSE and own:
            ours[block, name] = (*own[:2], own[2] + 1)
        if call["stored"]:
            theirs[bank] = (step, name, 0)
        elif call["decision"] == Decision.REUSE:
            entry = theirs[bank]
            assert list(entry[:2]) == call["delta_from"][1:]
            theirs[bank] = (*entry[:2], entry[2] + 1)
    return quirks


def state_of(prob: float, threshold: float, upper: float) -> Decision:
    """The decision of a probability, if there is a residual to re-use."""
    return Decision.SKIP if prob < threshold else Decision.REUSE if prob <= upper else Decision.RUN
