"""Does work that is not done take no time, at the sizes that people run?

`python -m benchmarks.real_size` builds the transformers of FLUX.1-dev and Qwen-Image as published, with random weights,
on the device, and times single denoise steps in one run, every contender in turn:

stock            the unmodified transformer, called as its pipeline does; with guidance that is one call a branch
stock, one call  the same with all branches in one call, shorter prompts padded and masked (Qwen-Image)
exact            our engine, everything runs
routers          the same, but routers score every block and their answers are read: what deciding costs
0.75 equal       the engine under a forced plan that leaves about 0.75 of the compute, the same plan in every row
0.75 mixed       the same plan at another depth in every row, so that rows must be gathered in most blocks

Of what a forced plan saves, about two fifths are by skips, two fifths by re-use and one fifth by narrower MLPs, evenly
over the depth. Routers run and are waited for as in serving, only their answer is not heeded, since random ones have
none. Random weights say nothing of quality and change no time. Prompts are random embeddings of realistic length.

time_ratio    a round's seconds over the same round's stock: median, and the middle four fifths
per_compute   time_ratio / compute_ratio: 1 if time follows compute
router_share  seconds of `routers` over those of `exact`, as a share of the contender's own
gather_cost   per_compute of `mixed` over that of `equal`, less 1: copies, and smaller batches
waits         times a step that the host waited for the device: on CUDA what `torch.cuda.set_sync_debug_mode` reports,
              else calls of Tensor.tolist and Tensor.item, which compiled code makes of its own accord
peak_gib      most device memory in use, weights included (CUDA); of it bank_gib are stored residuals
"""

import argparse
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.table import Row, finish, show
from models.card import EXACT, Policy
from models.diffusion.sampling import euler_step
from models.elastic.compute import BlockCost
from models.elastic.plan import REUSE, RUN_IN_FULL, SKIP, RowPlan, RowView, Rule
from models.elastic.router import MLP_WIDTHS, RouterStack
from models.engine import Engine
from models.families.flux.pipeline import FluxFamily
from models.families.image import Branch, ImageFamily
from models.families.qwen_image.pipeline import QwenImageFamily, pad_prompts
from models.report import Decision
from models.request import ImageRequest, Preset, PresetBudget
from models.rules.dense import DenseRule
from models.state import BranchInputs, DenoiseState
from models.weights import CheckpointTraits, RouterWeights

SHARES = (0.75, 0.5, 0.35)
_RUN_AND_KEEP = RowPlan(Decision.RUN, keeps_residual=True)


@dataclass(frozen=True, slots=True)
class Scale:
    """A transformer's configuration, the prompt tokens of each guidance branch, and what is measured."""

    config: Mapping[str, Any]
    num_text_tokens: Mapping[str, int]
    sides: Sequence[int]
    batch_sizes: Sequence[int]


class ForcedRule:
    """Does in every block what a list says, whatever the routers say."""

    name = "forced"
    needs_scores = True
    needs_residual_change = False

    def __init__(self, plans: Sequence[RowPlan]) -> None:
        self._plans = plans

    def plan(self, row: RowView, policy: Policy) -> RowPlan:
        plan = self._plans[row.block_index]
        return _RUN_AND_KEEP if plan == REUSE and row.num_reuses is None else plan


def forced_plans(costs: Sequence[BlockCost], share: float) -> list[RowPlan]:
    """Plans for blocks of these costs that leave about `share` of the compute.

    Blocks that run keep their residuals, as under the router rule when it may re-use.
    """
    to_save = (1 - share) * sum(cost.dense for cost in costs)
    left_out: list[RowPlan] = []
    chosen: list[RowPlan | None] = []
    debt = 0.0
    for cost in costs:
        debt += 0.8 * (1 - share) * cost.dense
        leaves_out = debt > cost.dense / 2
        if leaves_out:
            debt -= cost.dense
            to_save -= cost.dense
            left_out.append(REUSE if len(left_out) % 2 else SKIP)
        chosen.append(left_out[-1] if leaves_out else None)
    mean_width = 1 - to_save / sum(cost.mlp for cost, plan in zip(costs, chosen, strict=True) if plan is None)
    plans, error = [], 0.0
    for plan in chosen:
        if plan is None:
            width = min(MLP_WIDTHS, key=lambda w: abs(w - mean_width - error))
            error += mean_width - width
            plan = RowPlan(Decision.RUN, width, keeps_residual=True)
        plans.append(plan)
    return plans


class Subject(ImageFamily, ABC):
    """A family without text encoders and autoencoder: prompts are random embeddings, kept in `prompt_embeds`."""

    prompt_embeds: Mapping[str, Tensor]

    @abstractmethod
    def stock_steps(self) -> Mapping[str, Callable[[Sequence[DenoiseState]], list[Tensor]]]:
        """What the stock pipeline does with its transformer in a step: by name, from states to their next latents."""

    def _take_step(self, states: Sequence[DenoiseState], velocities: Sequence[Tensor]) -> list[Tensor]:
        """Guidance and the sampler's update. `velocities` holds each branch's `(requests, tokens, channels)`."""
        return [
            euler_step(
                state.latents,
                own[:1] if len(own) == 1 else self.guide(state.request, own),
                state.sigmas[state.step_index],
                state.sigmas[state.step_index + 1],
            )
            for i, state in enumerate(states)
            for own in [torch.cat([velocity[i : i + 1] for velocity in velocities])]
        ]


class FluxSubject(Subject, FluxFamily):
    full = Scale({"guidance_embeds": True}, {"cond": 512}, (1024, 512), (1, 2, 4))
    reduced = Scale(
        {
            "guidance_embeds": True,
            "num_layers": 2,
            "num_single_layers": 6,
            "attention_head_dim": 64,
            "num_attention_heads": 4,
            "axes_dims_rope": (16, 24, 24),
        },
        {"cond": 32},
        (256, 128),
        (1, 2),
    )

    def __init__(self, scale: Scale, device: torch.device, dtype: torch.dtype) -> None:
        transformer = random_module(lambda: FluxTransformer2DModel(**scale.config), device, dtype)
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer,
        )
        super().__init__("flux", pipeline, random_routers(transformer))
        self.prompt_embeds = random_prompts(transformer, scale)
        self.pooled = torch.randn(1, transformer.config.pooled_projection_dim, device=device, dtype=dtype)

    def _encode(self, branch: Branch, request: ImageRequest) -> BranchInputs:
        guidance = torch.full([1], request.guidance_scale, device=self.transformer.device)
        return BranchInputs(self.transformer.context_embedder(self.prompt_embeds[branch.name]), self.pooled, guidance)

    def stock_steps(self) -> Mapping[str, Callable[[Sequence[DenoiseState]], list[Tensor]]]:
        return {"stock": self._stock_step}

    @torch.inference_mode()
    def _stock_step(self, states: Sequence[DenoiseState]) -> list[Tensor]:
        request, count = states[0].request, len(states)
        assert isinstance(request, ImageRequest)
        embeds = self.prompt_embeds["cond"]
        _, image_ids = self.pipeline.prepare_latents(
            1, 16, request.height, request.width, embeds.dtype, embeds.device, None, states[0].latents
        )
        latents, times = self._latents_and_times(states)
        velocity = self.transformer(
            hidden_states=latents,
            timestep=times / 1000,
            guidance=torch.cat([state.inputs[0].guidance for state in states]),  # type: ignore[misc]  # FLUX.1-dev's
            pooled_projections=self.pooled.expand(count, -1),
            encoder_hidden_states=embeds.expand(count, -1, -1),
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return self._take_step(states, [velocity])


class QwenImageSubject(Subject, QwenImageFamily):
    # 60 tokens are a long sentence and the template's end; the negative prompt is a blank and that end.
    full = Scale({}, {"cond": 60, "uncond": 6}, (1024, 512), (1, 2, 4))
    reduced = Scale(
        {"num_layers": 6, "attention_head_dim": 64, "num_attention_heads": 4, "axes_dims_rope": (16, 24, 24)},
        {"cond": 60, "uncond": 6},
        (256, 128),
        (1, 2),
    )

    def __init__(self, scale: Scale, device: torch.device, dtype: torch.dtype) -> None:
        transformer = random_module(lambda: QwenImageTransformer2DModel(**scale.config), device, dtype)
        pipeline = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
        )
        super().__init__("qwen-image", pipeline, random_routers(transformer), CheckpointTraits())
        self.prompt_embeds = random_prompts(transformer, scale)

    def _encode(self, branch: Branch, request: ImageRequest) -> BranchInputs:
        embeds = self.prompt_embeds[branch.name]
        return BranchInputs(self.transformer.txt_in(self.transformer.txt_norm(embeds)))

    def stock_steps(self) -> Mapping[str, Callable[[Sequence[DenoiseState]], list[Tensor]]]:
        return {"stock": self._stock_step, "stock, one call": self._stock_step_in_one_call}

    @torch.inference_mode()
    def _stock_step(self, states: Sequence[DenoiseState]) -> list[Tensor]:
        branches = [embeds.expand(len(states), -1, -1) for embeds in self.prompt_embeds.values()]
        return self._take_step(states, [self._forward(states, embeds, None) for embeds in branches])

    @torch.inference_mode()
    def _stock_step_in_one_call(self, states: Sequence[DenoiseState]) -> list[Tensor]:
        embeds, mask = pad_prompts([e for e in self.prompt_embeds.values() for _ in states])
        return self._take_step(states, self._forward(states, embeds, mask).split(len(states)))

    def _forward(self, states: Sequence[DenoiseState], embeds: Tensor, mask: Tensor | None) -> Tensor:
        request, count = states[0].request, len(embeds)
        assert isinstance(request, ImageRequest)
        latents = torch.cat([state.latents for state in states]).repeat(count // len(states), 1, 1)
        time = states[0].timesteps[states[0].step_index].to(latents) / 1000
        shape = (1, request.height // self.pixels_per_token, request.width // self.pixels_per_token)
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            timestep=time.expand(count),
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            img_shapes=[[shape]] * count,
            return_dict=False,
        )[0]
        return velocity


SUBJECTS: Mapping[str, type[FluxSubject] | type[QwenImageSubject]] = {
    "flux": FluxSubject,
    "qwen-image": QwenImageSubject,
}


def random_module(build: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """What `build` makes, with PyTorch's random initialisation, made on the device in `dtype`."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            torch.manual_seed(0)
            return build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def random_routers(transformer: Any) -> RouterWeights:
    num_blocks = sum(len(part) for name, part in transformer.named_children() if name.endswith("transformer_blocks"))
    stack = random_module(lambda: RouterStack(num_blocks, transformer.inner_dim), transformer.device, transformer.dtype)
    return RouterWeights(stack, {})


def random_prompts(transformer: Any, scale: Scale) -> Mapping[str, Tensor]:
    channels = transformer.config.joint_attention_dim
    return {
        branch: torch.randn(1, count, channels, device=transformer.device, dtype=transformer.dtype)
        for branch, count in scale.num_text_tokens.items()
    }


@dataclass(frozen=True, slots=True)
class Contender:
    """Who takes the step: the stock transformer, by `stock_step`, or our engine under one rule a row."""

    name: str
    rules: Sequence[Rule]
    stock_step: Callable[[Sequence[DenoiseState]], object] | None = None


def contenders(subject: Subject, costs: Sequence[BlockCost], num_rows: int) -> list[Contender]:
    stock = [Contender(name, [DenseRule()] * num_rows, step) for name, step in subject.stock_steps().items()]
    everything = ForcedRule([RUN_IN_FULL] * len(costs))
    forced = []
    for share in SHARES:
        plans = forced_plans(costs, share)
        shifts = [row * len(plans) // num_rows for row in range(num_rows)]
        forced.append(Contender(f"{share} equal", [ForcedRule(plans)] * num_rows))
        if num_rows > 1:
            forced.append(Contender(f"{share} mixed", [ForcedRule(plans[n:] + plans[:n]) for n in shifts]))
    exact = Contender("exact", [DenseRule()] * num_rows)
    return [*stock, exact, Contender("routers", [everything] * num_rows), *forced]


def start(subject: Subject, side: int, batch_size: int) -> list[DenoiseState]:
    requests = [
        ImageRequest(
            model=subject.model_id,
            prompt="",
            height=side,
            width=side,
            num_inference_steps=8,
            guidance_scale=4.0,
            seed=seed,
            budget=PresetBudget(Preset.EXACT),
        )
        for seed in range(batch_size)
    ]
    return [subject.start(request, (EXACT,), EXACT) for request in requests]


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[str]]:
    """Collects one entry for every time that the host waits for the device."""
    waits: list[str] = []
    if device.type == "cuda":
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield waits
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits += [text for warning in caught if "synchroniz" in (text := str(warning.message))]
        return

    def counting(name: str, read: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
        def counted(tensor: Tensor) -> object:
            waits.append(name)
            return read(tensor)

        return counted

    with (
        patch.object(Tensor, "tolist", counting("tolist", Tensor.tolist)),
        patch.object(Tensor, "item", counting("item", Tensor.item)),
    ):
        yield waits


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    subject: Subject, side: int, batch_size: int, num_rounds: int, tick: Callable[[], object] = lambda: None
) -> list[Row]:
    """One row a contender, the columns as above; the first round, which also warms up, counts waits and memory."""
    device: torch.device = subject.transformer.device
    engine = Engine({subject.model_id: subject}, {})
    states = start(subject, side, batch_size)
    rows = [row for state in states for row in state.rows]
    field = contenders(subject, list(rows[0].costs.values()), len(rows))
    seconds: dict[str, list[float]] = {contender.name: [] for contender in field}
    observed: dict[str, Row] = {}
    for number in range(num_rounds + 1):
        first = number % len(field)  # nobody always comes after the same one
        for contender in (*field[first:], *field[:first]):
            states = start(subject, side, batch_size)
            for row, rule in zip([row for state in states for row in state.rows], contender.rules, strict=True):
                row.rule = rule
            step = contender.stock_step or engine.step
            step(states)  # fills the residual banks
            if number:
                synchronize(device)
                started = time.perf_counter()
                step(states)
                synchronize(device)
                seconds[contender.name].append(time.perf_counter() - started)
            else:
                observed[contender.name] = observe(step, states, device, is_stock=contender.stock_step is not None)
            tick()
    return [summary(contender.name, seconds, observed) for contender in field]


def observe(
    step: Callable[[Sequence[DenoiseState]], object],
    states: Sequence[DenoiseState],
    device: torch.device,
    *,
    is_stock: bool,
) -> Row:
    """What is counted, not timed, in a step."""
    spent = sum(state.spent_flops for state in states)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with counted_waits(device) as waits:
        step(states)
    residuals = [r for state in states for row in state.rows for r in row.residuals.values()]
    bank = sum(r.hidden_states.nbytes + r.encoder_hidden_states.nbytes for r in residuals)
    flops = sum(state.spent_flops for state in states) - spent
    return {
        "compute_ratio": 1.0 if is_stock else flops / sum(state.dense_flops for state in states),
        "waits": len(waits),
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "bank_gib": bank / 2**30,
    }


def summary(name: str, seconds: Mapping[str, Sequence[float]], observed: Mapping[str, Row]) -> Row:
    compute = {key: float(row["compute_ratio"] or 0) for key, row in observed.items()}
    typical = {key: statistics.median(times) for key, times in seconds.items()}
    ratios = sorted(t / stock for t, stock in zip(seconds[name], seconds["stock"], strict=True))
    per_compute = {key: typical[key] / typical["stock"] / compute[key] for key in compute}
    needs_routers = name == "routers" or name.endswith(("equal", "mixed"))
    gather_cost = per_compute[name] / per_compute[name.replace("mixed", "equal")] - 1 if "mixed" in name else None
    return {
        "name": name,
        "compute_ratio": compute[name],
        "seconds": typical[name],
        "time_ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 10],
        "high": ratios[-1 - len(ratios) // 10],
        "per_compute": statistics.median(ratios) / compute[name],
        "router_share": (typical["routers"] - typical["exact"]) / typical[name] if needs_routers else None,
        "gather_cost": gather_cost,
        **{key: observed[name][key] for key in ("waits", "peak_gib", "bank_gib")},
    }


def compile_blocks(subject: Subject) -> None:
    """Compile every block at every width; graphs are shared by blocks of a kind, and one serves all batches above 1."""
    torch._dynamo.config.recompile_limit = 64  # kinds, widths, sides, and batches of one or more
    for block in subject.blocks:
        for variant in block.variants.values():
            variant.compile(dynamic=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--reduced", action="store_true", help="small transformers, for a CPU; about a minute")
    parser.add_argument("--only", choices=SUBJECTS)
    parser.add_argument("--sides", type=int, nargs="+", metavar="PIXELS")
    parser.add_argument("--batches", type=int, nargs="+", metavar="SIZE")
    parser.add_argument("--rounds", type=int, help="timed ones; 7, or 3 if reduced")
    parser.add_argument("--compile", action="store_true", help="compile the blocks, the stock transformer's as well")
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    num_rounds = arguments.rounds or (3 if arguments.reduced else 7)
    results: list[Row] = []
    for model in [arguments.only] if arguments.only else SUBJECTS:
        cls = SUBJECTS[model]
        scale = cls.reduced if arguments.reduced else cls.full
        subject = cls(scale, device, dtype)
        if arguments.compile:
            compile_blocks(subject)
        for side in arguments.sides or scale.sides:
            for batch_size in arguments.batches or scale.batch_sizes:
                title = f"{model} at {side}x{side}, batch {batch_size}"
                with tqdm(desc=title, unit="step", leave=False) as bar:
                    rows = measure(subject, side, batch_size, num_rounds, bar.update)
                show(title, rows)
                results += [{"model": model, "side": side, "batch_size": batch_size, **row} for row in rows]
        del subject
        if device.type == "cuda":
            torch.cuda.empty_cache()
    finish(
        {
            "benchmark": "real_size",
            "environment": environment(),
            "run_on": f"{device} in {dtype}",
            "reduced": arguments.reduced,
            "compiled": arguments.compile,
            "steps": results,
        },
        arguments.json,
    )


if __name__ == "__main__":
    main()
