"""Trains the tiny diffusion transformers: flow matching on encoded samples, prepared for elasticity and guidance.

Four additions to plain flow matching:

- Half of the batches skip random blocks and use random MLP widths (stochastic depth, Huang et al. 2016; nested widths,
  Yu et al. 2018), so that routers later find blocks that can be skipped or narrowed.
- A small head predicts from the middle hidden states which object each token belongs to (cf. representation alignment,
  Yu et al. 2024). The transformer then learns shapes and their colours sooner.
- If guidance is an input, the last fifth of the run distils it (cf. Meng et al. 2023). The target of a sample with
  guidance w is shifted by (w - 1) times the network's own difference between prompt and no prompt.
- If guidance is classifier-free, some samples get a fragment of their caption, so that negative prompts have a meaning.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbone import Backbone, after_block
from training.lesson import Condition, Lesson
from training.loop import Stateful, run_loop
from training.optimizers import ScheduledOptimizers, split_optimizers, warm_then_linear
from training.precision import autocast

BATCH_SIZE = 40
"""Samples of a step in each process."""
DISTILLATION_SHARE = 0.2
"""Share of the run, at its end, that distils guidance."""


class WidthMasks:
    """Prefix masks on the hidden neurons of every MLP that can be narrowed; they are set between calls.

    Training masks an MLP instead of slicing it. The numbers are equal, and one compiled graph serves all widths.
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
        """Keep the share `widths[i]` of the hidden neurons of block i."""
        for masks, width in zip(self._masks, widths, strict=True):
            for mask, column in masks:
                end = column + int((len(mask) - column) * width)
                mask[:end] = 1
                mask[end:] = 0


class BaseObjective(nn.Module):
    """The losses of one training step."""

    def __init__(self, backbone: Backbone, lesson: Lesson) -> None:
        super().__init__()
        self.backbone = backbone
        self.transformer = backbone.transformer
        self.head = lesson.head
        self.lesson = lesson
        self.widths = WidthMasks(backbone)

    def velocity(
        self, latents: Tensor, timestep: Tensor, guidance: Tensor, condition: Condition, skipped: set[int]
    ) -> tuple[Tensor, Tensor]:
        """Returns the velocity and the hidden states in the middle of the network."""
        streams = self.backbone.prologue(latents, timestep, guidance, condition)
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
        """Returns the flow-matching loss and the auxiliary loss of these samples of the lesson.

        If `guided`, guidance is distilled for the first half of the batch.
        """
        batch = len(rows)
        clean = self.lesson.latents[rows].float()
        noise = self.lesson.noise(clean, rng)
        # Stratified, so that every batch covers the whole range of noise levels.
        uniform = (torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)) / batch
        timestep = torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))
        latents = torch.lerp(clean, noise, timestep[:, None, None])
        target = noise - clean
        condition, is_complete = self.lesson.conditions(rows, rng)
        guidance = torch.ones(batch)
        self.widths.set([1.0] * len(self.backbone.blocks))
        if guided:
            half = batch // 2
            guidance[:half] = 1 + 4 * torch.rand(half, generator=rng)
            target = target.clone()
            target[:half] += self._guidance_shift(latents, timestep, guidance, condition, is_complete, half)
        skipped = self._draw_sparsity(rng)
        with autocast():
            velocity, middle = self.velocity(latents, timestep, guidance, condition, skipped)
            output = None if self.head is None else self.head(middle)
        flow = F.mse_loss(velocity.float(), target)
        if output is None:
            return flow, flow.new_zeros(())
        return flow, self.lesson.auxiliary_loss(output.float(), rows, is_complete)

    def _draw_sparsity(self, rng: torch.Generator) -> set[int]:
        """Set random MLP widths and return the blocks to skip; half of the batches run everything."""
        num_blocks = len(self.backbone.blocks)
        if torch.rand(1, generator=rng) >= 0.5:
            return set()
        skipped = (torch.rand(num_blocks, generator=rng) < 0.28).nonzero().flatten().tolist()
        choice = torch.randint(1, 5, (num_blocks,), generator=rng) / 4
        self.widths.set(torch.where(torch.rand(num_blocks, generator=rng) < 0.5, choice, 1.0).tolist())
        return set(skipped)

    @torch.no_grad()
    def _guidance_shift(
        self,
        latents: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        condition: Condition,
        is_complete: Tensor,
        half: int,
    ) -> Tensor:
        """(w - 1) (v(prompt) - v(no prompt)) of the current network, for the first `half` rows.

        One call computes both velocities, which keeps the batch size that the blocks are compiled for.
        """
        latents, timestep = (torch.cat((tensor[:half], tensor[:half])) for tensor in (latents, timestep))
        both = condition.rows(slice(0, half)).join(self.lesson.no_condition.repeat(half))
        with autocast():
            velocity = self.velocity(latents, timestep, torch.ones(2 * half), both, set())[0].float()
        shift = (guidance[:half] - 1) * is_complete[:half]
        return shift[:, None, None] * (velocity[:half] - velocity[half:])


class MovingAverage:
    """Exponential moving average of a module's parameters, kept in the module `shadow`."""

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

    `look(step, share)` draws samples of the average; `share` is the share of the run that is done.
    """
    objective = BaseObjective(backbone, lesson)
    average = MovingAverage(backbone.transformer, average_of.transformer, decay=0.999)
    optimizers = split_optimizers(objective, matrix_lr=0.05, lr=2e-3)
    schedule = partial(warm_then_linear, num_steps=num_steps, warm_up=50, hold=0.5, end=0.02)
    scheduled = ScheduledOptimizers(optimizers, schedule, num_processes=num_processes)
    backbone.compile_blocks()

    def train_step(step: int) -> Mapping[str, float]:
        rng = torch.Generator().manual_seed(step * 64 + rank)
        rows = _rows_of_step(step, len(lesson.latents), rank, num_processes)
        guided = backbone.has_guidance_embedding and step >= num_steps * (1 - DISTILLATION_SHARE)
        flow, auxiliary = objective(rows, rng, guided)
        scheduled.minimise(flow + 0.1 * auxiliary, step)
        average.update()
        return {"flow": flow.item(), "auxiliary": auxiliary.item()}

    state: dict[str, Stateful] = {"objective": WithoutCompilation(objective), "average": average}
    run_loop(
        "transformer",
        num_steps,
        train_step,
        state | {f"optimizer.{number}": optimizer for number, optimizer in enumerate(optimizers)},
        run_dir / "base.pt",
        save_every=250,
        look=(lambda step: look(step, step / num_steps)) if rank == 0 else None,
        is_main=rank == 0,
    )


def _rows_of_step(step: int, num_samples: int, rank: int, num_processes: int) -> list[int]:
    """The samples of process `rank` at `step`: each epoch visits all samples in an order of its own."""
    global_batch = BATCH_SIZE * num_processes
    epoch, offset = divmod(step * global_batch, num_samples - global_batch)
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(epoch))
    return order[offset + rank * BATCH_SIZE : offset + (rank + 1) * BATCH_SIZE].tolist()


class WithoutCompilation:
    """A module's state under the names it has before compilation."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        return {k.replace("_orig_mod.", ""): v for k, v in self.module.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = {k.replace("_orig_mod.", ""): k for k in self.module.state_dict()}
        self.module.load_state_dict({names[k]: v for k, v in state.items()})
