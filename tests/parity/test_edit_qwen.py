"""`edit_qwen`: the whole model, run by the engine under the official policy and with the checkpoint's traits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor

from models.curve import EXACT, CurvePoint, Preset
from models.diffusion.sampling import flow_schedule
from models.elastic.plan import MLP_WIDTHS, Policy, RowPlan, RowView, Rule
from models.elastic.row import Row
from models.elastic.runner import run_block
from models.elastic.streams import Streams
from models.engine import Engine
from models.families.qwen_image import adapter
from models.families.qwen_image.conversion import router_tensors
from models.families.qwen_image.pipeline import QwenImageFamily
from models.report import Decision
from models.request import ImageRequest, PresetBudget
from models.rules import RULES
from models.rules.router import OFFICIAL
from models.state import BranchInputs, DenoiseState
from models.weights import CheckpointTraits, MlpActivation, RouterWeights, router_stack

NEAR: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}


@dataclass
class Watched:
    """The router rule; it records the views that it was given."""

    needs_scores: bool = True
    seen: list[RowView] = field(default_factory=list)

    def plan(self, row: RowView, policy: Policy) -> RowPlan:
        self.seen.append(row)
        return RULES["router"].plan(row, policy)


@pytest.fixture(scope="module")
def recording(recorded: Callable[[str], Any]) -> Any:
    return recorded("edit_qwen")


@pytest.fixture(scope="module")
def build_family(recording: Any) -> Callable[[MlpActivation], QwenImageFamily]:
    config = recording.settings["config"]
    # Qwen-Image's own scheduler: dynamic shifting, stretched to end at 0.02.
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )

    def build_family(activation: MlpActivation) -> QwenImageFamily:
        transformer = QwenImageTransformer2DModel(
            patch_size=config["patch_size"],
            in_channels=config["in_channels"],
            out_channels=config["latent_channels"],
            num_layers=config["layers"],
            attention_head_dim=config["dim"] // config["heads"],
            num_attention_heads=config["heads"],
            joint_attention_dim=config["joint_attention_dim"],
            axes_dims_rope=tuple(config["axes"]),
        )
        backbone = {key: t for key, t in recording.weights.items() if not key.startswith("gate_mlps.")}
        transformer.load_state_dict(backbone)
        transformer.eval().requires_grad_(False)
        pipeline = QwenImagePipeline(
            scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None, transformer=transformer
        )
        routers = RouterWeights(router_stack(router_tensors(recording.weights)))
        return QwenImageFamily("qwen", pipeline, routers, CheckpointTraits(activation, rescales_guidance=False))

    return build_family


@pytest.fixture(scope="module")
def family(build_family: Callable[[MlpActivation], QwenImageFamily]) -> QwenImageFamily:
    return build_family(MlpActivation.GELU_SIGMOID)


@pytest.fixture(scope="module")
def state_of(recording: Any) -> Callable[..., DenoiseState]:
    config = recording.settings["config"]

    def state_of(
        family: QwenImageFamily,
        latents: Tensor,
        prompts: dict[str, Tensor],
        schedule: tuple[Tensor, Tensor],
        rule: Callable[[], Rule[Any]],
        guidance_scale: float = 1.0,
    ) -> DenoiseState:
        """The state of a request with encoded prompts. `latents` is `(1, channels, height, width)`."""
        sigmas, timesteps = schedule
        request = ImageRequest(
            model="qwen",
            prompt="",
            height=config["height"],
            width=config["width"],
            num_inference_steps=len(timesteps),
            guidance_scale=guidance_scale,
            seed=0,
            budget=PresetBudget(Preset.EXACT),
            point=EXACT,
            is_guided=guidance_scale > 1,
        )
        rows = [
            Row(
                rule(),
                OFFICIAL,
                branch,
                len(timesteps),
                family.block_costs(request.height, request.width, prompt.shape[1]),
                prompt.shape[1],
            )
            for branch, prompt in prompts.items()
        ]
        return DenoiseState(
            request=request,
            shape="",
            latents=pack(latents),
            sigmas=sigmas,
            timesteps=timesteps,
            rows=rows,
            inputs=[BranchInputs(adapter.embed_prompt(family.transformer, prompt)) for prompt in prompts.values()],
            curve=(),
            point=CurvePoint(OFFICIAL, 1.0, 1.0, 1.0, 1.0),
            dense_flops=1.0,
            compute_cap=None,
        )

    return state_of


def pack(latents: Tensor) -> Tensor:
    packed: Tensor = QwenImagePipeline._pack_latents(latents, *latents.shape)
    return packed


def velocities(family: QwenImageFamily, states: Sequence[DenoiseState]) -> Tensor:
    """Velocities `(rows, tokens, channels)` of one call of the model, as in a step of the engine."""
    for state in states:
        state.prepare_step()
    rows = [row for state in states for row in state.rows]
    streams: Streams = family.prologue(states)
    modulations = family.router_modulations(streams)
    assert modulations is not None
    for index, block in enumerate(family.blocks):
        streams = run_block(block, index, streams, modulations[index], rows).streams
    for row in rows:
        row.end_step()
    return adapter.epilogue(family.transformer, streams)


@pytest.fixture(scope="module")
def single_states(recording: Any, state_of: Callable[..., DenoiseState]) -> Callable[..., list[DenoiseState]]:
    """The calls of the recording `single`: one per timestep, each with fresh state."""

    def single_states(family: QwenImageFamily, rule: Callable[[], Rule[Any]], branch: str) -> list[DenoiseState]:
        prompts = {branch: recording.tensors[f"in/single/prompt_{branch}"]}
        latents, timesteps = (recording.tensors[f"in/single/{name}"] for name in ("latents", "timestep"))
        # The schedule has a second step, so that the call is not the last one of its request.
        return [
            state_of(family, noisy, prompts, (torch.ones(3), timestep.expand(2)), rule)
            for noisy, timestep in zip(latents, timesteps, strict=True)
        ]

    return single_states


def test_packed_latents_are_as_recorded(recording: Any) -> None:
    for latents, packed in zip(
        recording.tensors["in/single/latents"], recording.tensors["in/single/packed"], strict=True
    ):
        assert torch.equal(pack(latents), packed)


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_elastic_call_is_as_recorded(
    recording: Any, family: QwenImageFamily, single_states: Callable[..., list[DenoiseState]], branch: str
) -> None:
    trace = recording.settings["traces"]["single"]
    calls = [dict(zip(trace["columns"], row, strict=True)) for row in trace["rows"]]
    for number, state in enumerate(single_states(family, Watched, branch)):
        velocity = velocities(family, [state])
        rule = state.rows[0].rule
        assert isinstance(rule, Watched)
        assert_decisions(state.rows[0], [call for call in calls if (call["step"], call["branch"]) == (number, branch)])
        probs = recording.tensors[f"out/single/{branch}/prob"][number].flatten().tolist()
        assert [view.depth_prob for view in rule.seen] == pytest.approx(probs, abs=1e-5, rel=0)
        torch.testing.assert_close(velocity, recording.tensors[f"out/single/{branch}/packed"][number], **NEAR)


@pytest.mark.parametrize("branch", ["cond", "uncond"])
@pytest.mark.parametrize(
    ("activation", "case"),
    [(MlpActivation.GELU_SIGMOID, "full"), (MlpActivation.GELU_TANH, "diffusers_tanh")],
)
def test_dense_call_is_as_recorded(
    recording: Any,
    build_family: Callable[[MlpActivation], QwenImageFamily],
    single_states: Callable[..., list[DenoiseState]],
    activation: MlpActivation,
    case: str,
    branch: str,
) -> None:
    family = build_family(activation)
    velocity = velocities(family, single_states(family, lambda: RULES["dense"], branch))
    torch.testing.assert_close(velocity, recording.tensors[f"out/{case}/{branch}/packed"][:, 0], **NEAR)


@pytest.fixture(scope="module")
def start(recording: Any, family: QwenImageFamily, state_of: Callable[..., DenoiseState]) -> Callable[[], DenoiseState]:
    """The request of the recording `denoise`."""

    def start() -> DenoiseState:
        settings = recording.settings["denoise"]
        prompts = {branch: recording.tensors[f"in/denoise/prompt_{branch}"] for branch in ("cond", "uncond")}
        schedule = flow_schedule(family.pipeline.scheduler, settings["steps"], settings["dynamic_shift_len"])
        latents = recording.tensors["in/denoise/latents"]
        return state_of(family, latents, prompts, schedule, Watched, settings["cfg_scale"])

    return start


def test_schedule_is_as_recorded(recording: Any, start: Callable[[], DenoiseState]) -> None:
    state = start()
    expected = recording.tensors["out/denoise/sigmas"]
    torch.testing.assert_close(state.sigmas[: len(expected)], expected, **NEAR)
    torch.testing.assert_close(state.timesteps, recording.tensors["out/denoise/timesteps"], **NEAR)


def test_sampling_run_is_as_recorded(
    recording: Any, family: QwenImageFamily, start: Callable[[], DenoiseState]
) -> None:
    trace = recording.settings["traces"]["denoise"]
    calls = [dict(zip(trace["columns"], row, strict=True)) for row in trace["rows"]]
    state, engine = start(), Engine({"qwen": family}, {})
    for expected in recording.tensors["out/denoise/latents"]:
        engine.step([state])
        torch.testing.assert_close(state.latents, pack(expected), **NEAR)
    assert state.is_done
    for row in state.rows:
        assert_decisions(row, [call for call in calls if call["branch"] == row.branch])


def test_each_branch_and_their_guided_velocity_are_as_recorded(
    recording: Any, family: QwenImageFamily, start: Callable[[], DenoiseState]
) -> None:
    """Every step starts from the recorded latents, so that differences do not accumulate."""
    state = start()
    recorded = {name: recording.tensors[f"out/denoise/{name}"] for name in ("cond_pred", "uncond_pred", "noise_pred")}
    for step, latents in enumerate(recording.tensors["out/denoise/latents"]):
        both = velocities(family, [state])
        torch.testing.assert_close(both[:1], pack(recorded["cond_pred"][step]), **NEAR)
        torch.testing.assert_close(both[1:], pack(recorded["uncond_pred"][step]), **NEAR)
        guided = family.guide(state.request, both)
        # Guidance multiplies the difference of the two branches.
        near: dict[str, Any] = {"atol": NEAR["atol"] * state.request.guidance_scale, "rtol": NEAR["rtol"]}
        torch.testing.assert_close(guided, pack(recorded["noise_pred"][step]), **near)
        state.latents, state.step_index = pack(latents), step + 1


def assert_decisions(row: Row, calls: Sequence[dict[str, Any]]) -> None:
    """Assert that a row's decisions, widths and probabilities are those of its recorded calls."""
    assert isinstance(row.rule, Watched)
    for view, done, call in zip(row.rule.seen, row.trace, calls, strict=True):
        assert done.decision == call["decision"]
        assert view.depth_prob == pytest.approx(call["prob"], abs=1e-5, rel=0)
        if done.decision is Decision.RUN:
            assert done.mlp_width == MLP_WIDTHS[call["width_idx"][0]]
