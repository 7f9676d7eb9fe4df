"""The tiny diffusion transformers: flow matching on encoded samples, made ready for elasticity and for guidance.

Three things are taught besides plain flow matching. Half of the batches run with random blocks left out and random MLP
widths (stochastic depth, Huang et al. 2016; nested widths, Yu et al. 2018), so that routers find something to save. A
small head reads from the middle of the network which object each token belongs to (cf. representation alignment, Yu et
al. 2024), which speeds up shape and binding. Where guidance is an input, its embedding is distilled in the last fifth:
the target of a sample with guidance w is moved by (w - 1) times the network's own difference between prompt and no
prompt (cf. Meng et al. 2023). Where it is true guidance, some samples are told a fragment instead of their caption, so
that negative prompts have a meaning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic.streams import Streams
from training.backbones import Backbone
from training.lesson import Lesson
from training.loop import run_loop, warm_then_linear
from training.muon import Muon
from training.precision import autocast
from training.scenes.text import Text

BATCH_SIZE = 40  # a process
DISTILLATION_SHARE = 0.2
"""Of the run, at its end, where guidance is an input."""


class WidthMasks:
    """Prefix masks on the hidden neurons of every MLP that may be narrowed, set between calls.

    In training a narrow MLP is a masked one: the same numbers as a sliced one, and one compiled graph for all widths.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._masks: list[list[tuple[Tensor, int]]] = []
        for block in backbone.blocks.values():
            self._masks.append([])
            for mlp in backbone.mlps(block).values():
                mask = torch.ones(mlp.last.in_features)
                mlp.last.register_buffer("width_mask", mask, persistent=False)
                mlp.last.register_forward_pre_hook(lambda module, args: (args[0] * module.width_mask,))
                self._masks[-1].append((mask, mlp.column))

    def set(self, widths: Sequence[float]) -> None:
        """`widths` holds the share of hidden neurons of each block that stays."""
        for masks, width in zip(self._masks, widths, strict=True):
            for mask, column in masks:
                end = column + int((len(mask) - column) * width)
                mask[:end] = 1
                mask[end:] = 0


class _Objective(nn.Module):
    """One training step's loss for a batch of samples."""

    def __init__(self, backbone: Backbone, lesson: Lesson) -> None:
        super().__init__()
        self.backbone = backbone
        self.transformer = backbone.transformer
        self.head = lesson.head
        self.lesson = lesson
        self.widths = WidthMasks(backbone)

    def velocity(
        self, latents: Tensor, timestep: Tensor, guidance: Tensor, text: Text, skipped: set[int]
    ) -> tuple[Tensor, Tensor]:
        """Returns the velocity and the middle hidden states."""
        streams = self.backbone.prologue(latents, timestep, guidance, text)
        middle = streams.hidden_states
        for i, block in enumerate(self.backbone.blocks.values()):
            streams = self.backbone.enter(i, streams)
            if i not in skipped:
                streams = after_block(self.backbone, block, streams)
            streams = self.backbone.leave(i, streams)
            if i == len(self.backbone.blocks) // 2 - 1:
                middle = streams.hidden_states
        return self.backbone.epilogue(streams), middle

    def forward(self, rows: list[int], rng: torch.Generator, guided: bool) -> tuple[Tensor, Tensor]:
        """Returns the flow-matching loss of these samples of the lesson, and the auxiliary one."""
        batch = len(rows)
        num_blocks = len(self.backbone.blocks)
        clean = self.lesson.latents[rows].float()
        noise = self.lesson.noise(clean, rng)
        # Stratified, so that every batch sees the whole range of noise levels.
        uniform = (torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)) / batch
        timestep = torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))
        latents = torch.lerp(clean, noise, timestep[:, None, None])
        target = noise - clean
        text, told = self.lesson.conditions(rows, rng)
        guidance = torch.ones(batch)
        self.widths.set([1.0] * num_blocks)
        if guided:
            half = batch // 2
            guidance[:half] = 1 + 4 * torch.rand(half, generator=rng)
            target = target.clone()
            target[:half] += self._guidance_shift(latents, timestep, guidance, text, told, half)
        skipped: set[int] = set()
        if torch.rand(1, generator=rng) < 0.5:
            skipped = set((torch.rand(num_blocks, generator=rng) < 0.28).nonzero().flatten().tolist())
            choice = torch.randint(1, 5, (num_blocks,), generator=rng) / 4
            self.widths.set(torch.where(torch.rand(num_blocks, generator=rng) < 0.5, choice, 1.0).tolist())
        with autocast():
            velocity, middle = self.velocity(latents, timestep, guidance, text, skipped)
            output = None if self.head is None else self.head(middle)
        flow = F.mse_loss(velocity.float(), target)
        return flow, flow.new_zeros(()) if output is None else self.lesson.auxiliary_loss(output.float(), rows, told)

    @torch.no_grad()
    def _guidance_shift(
        self, latents: Tensor, timestep: Tensor, guidance: Tensor, text: Text, told: Tensor, half: int
    ) -> Tensor:
        """(w - 1) (v(prompt) - v(no prompt)), with the network as it is, for the first `half` rows.

        Both halves go in one call, which keeps the compiled batch size.
        """
        pair = [torch.cat((part[:half], part[:half])) for part in (latents, timestep)]
        texts = text.rows(slice(0, half)).join(self.lesson.no_condition.repeat(half))
        with autocast():
            velocity = self.velocity(pair[0], pair[1], torch.ones(2 * half), texts, set())[0].float()
        shift = (guidance[:half] - 1) * told[:half]
        return shift[:, None, None] * (velocity[:half] - velocity[half:])


class MovingAverage:
    """Exponential moving average of a module's parameters, in a module of its own."""

    def __init__(self, module: nn.Module, shadow: nn.Module, decay: float) -> None:
        self.module, self.shadow, self.decay = module, shadow, decay
        self.count = 0
        shadow.load_state_dict(module.state_dict())
        shadow.requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        averages: list[Tensor] = list(self.shadow.parameters())
        values: list[Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(averages, values, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "shadow": self.shadow.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        self.shadow.load_state_dict(state["shadow"])


def split_optimizers(
    module: nn.Module, *, matrix_lr: float, lr: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else. Modulations and gates count as that too."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_other = any(part in name for part in ("norm", "_mod.", ".gate."))
            is_inside = ("blocks." in name or ".layer." in name) and parameter.ndim == 2 and not is_other
            (matrices if is_inside else others).append(parameter)
    return (
        Muon(matrices, lr=matrix_lr),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    )


def average_gradients(parameters: Sequence[nn.Parameter], num_processes: int) -> None:
    """Average gradients over processes in one exchange; a block that a process left out counts as zero."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if num_processes == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= num_processes
    offset = 0
    for p in parameters:
        assert p.grad is not None
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
        offset += p.numel()


def train_base(
    run_dir: Path,
    backbone: Backbone,
    average_of: Backbone,
    lesson: Lesson,
    look: Callable[[int, float], None],
    *,
    rank: int,
    num_processes: int,
    num_steps: int,
) -> None:
    """Train `backbone`, or resume, as process `rank` of `num_processes`; `average_of` gets its moving average.

    `look(step, share)` shows what that can do, `share` of the way through the run.
    """
    latents = lesson.latents
    objective = _Objective(backbone, lesson)
    average = MovingAverage(backbone.transformer, average_of.transformer, decay=0.999)
    optimizers = split_optimizers(objective, matrix_lr=0.05, lr=2e-3)
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for p in objective.parameters() if p.requires_grad]
    backbone.compile_blocks()
    global_batch = BATCH_SIZE * num_processes

    def train_step(step: int) -> Mapping[str, float]:
        rng = torch.Generator().manual_seed(step * 64 + rank)
        epoch, offset = divmod(step * global_batch, len(latents) - global_batch)
        order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(epoch))
        rows = order[offset + rank * BATCH_SIZE : offset + (rank + 1) * BATCH_SIZE].tolist()
        guided = backbone.has_guidance_embedding and step >= num_steps * (1 - DISTILLATION_SHARE)
        flow, auxiliary = objective(rows, rng, guided)
        for optimizer in optimizers:
            optimizer.zero_grad()
        (flow + 0.1 * auxiliary).backward()
        average_gradients(parameters, num_processes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        factor = warm_then_linear(step, num_steps, warm_up=50, hold=0.5, end=0.02)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, base in zip(groups, base_rates, strict=True):
            group["lr"] = base * factor
        for optimizer in optimizers:
            optimizer.step()
        average.update()
        return {"flow": flow.item(), "auxiliary": auxiliary.item()}

    run_loop(
        "transformer",
        num_steps,
        train_step,
        {
            "objective": _WithoutCompilation(objective),
            "average": average,
            **{f"optimizer.{number}": optimizer for number, optimizer in enumerate(optimizers)},
        },
        run_dir / "base.pt",
        save_every=250,
        look=(lambda step: look(step, step / num_steps)) if rank == 0 else None,
        is_main=rank == 0,
    )


class _WithoutCompilation:
    """A module's state under the names that it has uncompiled."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        return {k.replace("_orig_mod.", ""): v for k, v in self.module.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = {k.replace("_orig_mod.", ""): k for k in self.module.state_dict()}
        self.module.load_state_dict({names[k]: v for k, v in state.items()})


def after_block(backbone: Backbone, block: nn.Module, streams: Streams) -> Streams:
    """The streams after one block."""
    text_stream, image_stream = backbone.call_block(block, streams)
    return replace(streams, hidden_states=image_stream, encoder_hidden_states=text_stream)


def run_all(backbone: Backbone, streams: Streams) -> Tensor:
    """The velocity, every block being run on `streams`."""
    for i, block in enumerate(backbone.blocks.values()):
        streams = backbone.leave(i, after_block(backbone, block, backbone.enter(i, streams)))
    return backbone.epilogue(streams)


@torch.no_grad()
def sample(
    backbone: Backbone,
    text: Text,
    no_prompt: Text | None,
    shape: tuple[int, int],
    *,
    guidance_scale: float,
    num_steps: int = 20,
    seed: int = 0,
) -> Tensor:
    """Euler sampling for looks during training: latents `(batch, *shape)`, `shape` being their tokens and channels.

    With `no_prompt` guidance is classifier-free, else distilled.
    """
    batch = len(text.embeds)
    latents = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
    sigmas = torch.linspace(1, 0, num_steps + 1)
    scale = torch.full((batch,), 1.0 if no_prompt else guidance_scale)

    def velocity(which: Text, sigma: Tensor) -> Tensor:
        streams = backbone.prologue(latents, sigma.expand(batch), scale, which)
        return run_all(backbone, streams)

    for sigma, following in pairwise(sigmas):
        step = velocity(text, sigma)
        if no_prompt:
            other = velocity(no_prompt.repeat(batch), sigma)
            step = other + guidance_scale * (step - other)
        latents = latents + (following - sigma) * step
    return latents
