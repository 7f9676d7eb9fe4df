"""Trains routers for the tiny models: which blocks a sample needs at a step, and how wide. The backbone is frozen.

The recipe follows Elastic Diffusion Transformer (arXiv 2602.13993): hard decisions forward, soft gradients backward.
All blocks are computed for all samples, so that closed gates still learn. One deviation: serving needs a whole range
of budgets from one set of routers. So each batch draws a skip threshold and a width bias, and these set the mean gate
and the mean width to reach. Both are means over the batch, so routers choose which samples and noise levels get more.
`training.published` has the objective without this deviation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic.plan import MLP_WIDTHS
from models.elastic.router import RouterStack
from models.elastic.streams import Streams
from models.neuron_order import mlps_by_name, reorderings, write_reordered
from models.weights import RouterWeights
from training.backbone import Backbone, run_all
from training.lesson import Lesson
from training.loop import run_loop
from training.optimizers import ScheduledOptimizers, warm_then_linear
from training.precision import autocast

BATCH_SIZE = 32
"""Samples of a step in each process."""
HIDDEN = 32
MAX_WIDTH_BIAS = 4.0
GUIDANCE_SCALE = 3.0
"""The guidance scale that routers of models with classifier-free guidance are trained for: the models' default."""
SEED = 6


@dataclass(frozen=True, slots=True)
class Knobs:
    """The settings of one batch, as a policy sets them in serving."""

    skip_threshold: float
    width_bias: float

    @property
    def target_gate(self) -> float:
        """The share of blocks to run: nearly all at threshold 0, a fifth at 1."""
        return 1 - 0.8 * self.skip_threshold

    @property
    def target_width(self) -> float:
        """The mean MLP width: nearly full without bias, slightly over a third at the strongest bias."""
        return 0.97 - 0.6 * self.width_bias / MAX_WIDTH_BIAS


@dataclass(frozen=True, slots=True)
class Decided:
    """What the routers decided for each block and sample: hard values with soft gradients, and the probabilities.

    All are `(blocks, batch)`. `gates` are 0 or 1, `widths` one of MLP_WIDTHS. `depths` are the probabilities to run,
    and `expected_widths` the widths' means under their probabilities.
    """

    gates: Tensor
    widths: Tensor
    depths: Tensor
    expected_widths: Tensor


def elastic_forward(
    backbone: Backbone,
    routers: RouterStack,
    streams: Streams,
    knobs: Knobs,
) -> tuple[Tensor, Decided]:
    """Run every block for every sample, gated and masked by its router's hard decision, with soft gradients.

    Returns the velocity `(batch, tokens, channels)` and the decisions.
    """
    decided: list[tuple[Tensor, ...]] = []
    lowered = torch.tensor([1 - i / (len(MLP_WIDTHS) - 1) for i in range(len(MLP_WIDTHS))]) * knobs.width_bias
    shares = torch.tensor(MLP_WIDTHS)
    for i, (router, block) in enumerate(zip(routers.routers, backbone.blocks.values(), strict=True)):
        streams = backbone.enter(i, streams)
        before = (streams.encoder_hidden_states, streams.hidden_states)
        scored, masks = streams.scored
        with torch.autocast("cpu", enabled=False):
            inputs = [stream.float() for stream in scored]
            scores = router(inputs, router.modulation(streams.temb.float()), masks)
        gate = hard_gate(scores.depth_logits, knobs.skip_threshold)
        width_logits = scores.width_logits + lowered
        width = hard_width(width_logits)
        for mlp in backbone.mlps(block).values():
            mlp.last.width_mask = prefix_mask(width, mlp.num_hidden, mlp.column)
        after = backbone.call_block(block, streams)
        text, image = (x + gate[:, None, None] * (y - x) for x, y in zip(before, after, strict=True))
        streams = backbone.leave(i, replace(streams, hidden_states=image, encoder_hidden_states=text))
        decided.append((gate, width @ shares, scores.depth_logits.sigmoid(), width_logits.softmax(1) @ shares))
    return backbone.epilogue(streams), Decided(*(torch.stack(values) for values in zip(*decided, strict=True)))


def hard_gate(depth_logits: Tensor, skip_threshold: float) -> Tensor:
    """0 or 1, `(batch,)`, with the gradient of the probability.

    A probability equal to the threshold opens the gate, as in serving. In the official training code (Elastic-DiT at
    ce39f1d) it closes the gate, unlike in its inference code.
    """
    soft = torch.sigmoid(depth_logits)
    return (soft >= skip_threshold).float() + soft - soft.detach()


def hard_width(width_logits: Tensor) -> Tensor:
    """One-hot choice of MLP_WIDTHS `(batch, 4)`, with the gradient of the probabilities."""
    soft = torch.softmax(width_logits, dim=1)
    return F.one_hot(soft.argmax(1), len(MLP_WIDTHS)) + soft - soft.detach()


def prefix_mask(width: Tensor, hidden: int, column: int) -> Tensor:
    """Mask `(batch, 1, column + hidden)` from one-hot widths `(batch, 4)`; the first `column` features are all kept."""
    quarter = hidden // len(MLP_WIDTHS)
    # A width of index k keeps neuron groups 0 to k.
    kept = width.flip(1).cumsum(1).flip(1).repeat_interleave(quarter, dim=1)
    return torch.cat((kept.new_ones(len(kept), column), kept), dim=1)[:, None]


def install_masks(backbone: Backbone) -> None:
    """Make every MLP that can be narrowed multiply its hidden neurons by its `width_mask`."""
    for block in backbone.blocks.values():
        for mlp in backbone.mlps(block).values():
            mlp.last.width_mask = torch.ones(())
            mlp.last.register_forward_pre_hook(lambda module, args: (args[0] * module.width_mask,))


@dataclass(frozen=True, slots=True)
class _NoisyBatch:
    """Samples on their way to noise. `(batch, tokens, channels)` each, but `timestep` and `guidance` `(batch,)`."""

    latents: Tensor
    velocity: Tensor
    timestep: Tensor
    guidance: Tensor


class RouterObjective:
    """The losses of one training step, and the knobs that a step draws.

    With classifier-free guidance a batch is paired: its second half are the unconditional branches of its first half.
    """

    WEIGHTS: ClassVar[Mapping[str, float]] = {"flow": 1.0, "dense": 1.0, "gate": 8.0, "width": 8.0}
    """How much each loss counts."""

    def __init__(self, backbone: Backbone, lesson: Lesson, routers: RouterStack) -> None:
        self.backbone = backbone
        self.lesson = lesson
        self.routers = routers
        self._is_paired = not backbone.has_guidance_embedding
        backbone.transformer.requires_grad_(False)
        install_masks(backbone)

    def knobs(self, rng: torch.Generator) -> Knobs:
        """The knobs of one step: any budget."""
        threshold, bias = torch.rand(2, generator=rng).tolist()
        return Knobs(0.02 + 0.96 * threshold, MAX_WIDTH_BIAS * bias)

    def losses(self, rows: list[int], rng: torch.Generator, knobs: Knobs) -> dict[str, Tensor]:
        """The losses of samples `rows` of the lesson.

        `flow` is the flow-matching error, `dense` the distance to the dense prediction, `gate` and `width` the squared
        distances of mean gate and mean width from the targets of `knobs`.
        """
        half = len(rows) // 2
        if self._is_paired:
            rows = rows[:half] * 2
        batch = self._noisy_batch(rows, rng)
        with torch.no_grad():
            streams = self._prologue(rows, batch)
            with autocast():
                dense = self._dense(streams).float()
        with autocast():
            velocity, decided = elastic_forward(self.backbone, self.routers, streams, knobs)
        ran = decided.gates.detach()
        mean_width = (decided.widths * ran).sum() / ran.sum().clamp(min=1)
        return {
            "flow": F.mse_loss(velocity.float()[:half], batch.velocity[:half]),
            "dense": self._distance(velocity.float() - dense),
            "gate": (decided.gates.mean() - knobs.target_gate).square(),
            "width": (mean_width - knobs.target_width).square(),
        }

    def _noisy_batch(self, rows: list[int], rng: torch.Generator) -> _NoisyBatch:
        batch, half = len(rows), len(rows) // 2
        clean = self.lesson.latents[rows].float()
        noise = self.lesson.noise(clean, rng)
        # Noise levels are uniform, as in sampling, and stratified over the batch.
        timestep = (torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)) / batch
        if self._is_paired:
            noise, timestep = (torch.cat((tensor[:half], tensor[:half])) for tensor in (noise, timestep))
        # The first half has no guidance, so its right answer is in the data. The second half is guided as in serving;
        # its right answer is the dense model's.
        guidance = 1 + 4 * torch.rand(batch, generator=rng)
        guidance[:half] = 1
        return _NoisyBatch(torch.lerp(clean, noise, timestep[:, None, None]), noise - clean, timestep, guidance)

    def _prologue(self, rows: list[int], batch: _NoisyBatch) -> Streams:
        if self._is_paired:
            half = len(rows) // 2
            condition = self.lesson.full_conditions(rows[:half]).join(self.lesson.no_condition.repeat(half))
        else:
            condition = self.lesson.full_conditions(rows)
        return self.backbone.prologue(batch.latents, batch.timestep, batch.guidance, condition)

    def _dense(self, streams: Streams) -> Tensor:
        for block in self.backbone.blocks.values():
            for mlp in self.backbone.mlps(block).values():
                mlp.last.width_mask = torch.ones(())
        return run_all(self.backbone, streams)

    def _distance(self, error: Tensor) -> Tensor:
        """Mean square of the velocities' error; of a paired batch, the mean of this and of the error after guidance."""
        distance = error.square().mean()
        if not self._is_paired:
            return distance
        conditional, unconditional = error.chunk(2)
        guided = GUIDANCE_SCALE * conditional - (GUIDANCE_SCALE - 1) * unconditional
        # The divisor makes both terms equally large if the branches' errors are independent.
        return (distance + guided.square().mean() / (GUIDANCE_SCALE**2 + (GUIDANCE_SCALE - 1) ** 2)) / 2


def order_neurons(backbone: Backbone, lesson: Lesson, checkpoint_file: Path) -> None:
    """Sort the hidden neurons in `checkpoint_file`, which has the backbone, by importance: narrow MLPs keep the first.

    Comes before routers, which learn what narrow MLPs do.
    """
    objective = RouterObjective(backbone, lesson, RouterStack(len(backbone.blocks), backbone.channels, HIDDEN))
    orders = neuron_orders(objective, list(range(2 * BATCH_SIZE)), torch.Generator().manual_seed(SEED))
    mlps = mlps_by_name(backbone.blocks, backbone.mlps)
    ordered = checkpoint_file.with_suffix(".ordered")
    write_reordered({checkpoint_file: ordered}, reorderings(backbone.transformer, mlps, orders))
    ordered.replace(checkpoint_file)


def neuron_orders(objective: RouterObjective, rows: list[int], rng: torch.Generator) -> dict[str, Tensor]:
    """The hidden neurons of each MLP, the most important first, as their present positions `(hidden,)`.

    Importance is the mean |activation| over all tokens of the samples, times the norm of the output column.
    """
    importance: dict[str, Tensor] = {}
    handles = []
    for name, mlp in mlps_by_name(objective.backbone.blocks, objective.backbone.mlps).items():

        def measure(module: nn.Linear, args: tuple[Tensor], name: str = name, column: int = mlp.column) -> None:
            activation = args[0][..., column:].float().abs().flatten(0, -2).mean(0)
            importance[name] = activation * module.weight[:, column:].float().norm(dim=0)

        handles.append(mlp.last.register_forward_pre_hook(measure))
    with torch.no_grad():
        objective.losses(rows, rng, Knobs(0.0, 0.0))
    for handle in handles:
        handle.remove()
    return {name: values.argsort(descending=True) for name, values in importance.items()}


def train_routers(
    run_dir: Path,
    backbone: Backbone,
    lesson: Lesson,
    new_objective: type[RouterObjective],
    *,
    rank: int,
    num_processes: int,
    num_steps: int,
) -> RouterWeights:
    """Train, or resume, as process `rank` of `num_processes`. The backbone's neurons are in order (`order_neurons`)."""
    torch.manual_seed(SEED)
    routers = RouterStack(len(backbone.blocks), backbone.channels, HIDDEN)
    objective = new_objective(backbone, lesson, routers)
    optimizer = torch.optim.AdamW(routers.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = partial(warm_then_linear, num_steps=num_steps, warm_up=20, hold=0.5, end=0.02)
    scheduled = ScheduledOptimizers([optimizer], schedule, num_processes=num_processes)

    def train_step(step: int) -> Mapping[str, float]:
        rng = torch.Generator().manual_seed(SEED * 10**6 + step * 64 + rank)
        knobs = objective.knobs(rng)
        rows = torch.randint(len(lesson.latents), (BATCH_SIZE,), generator=rng).tolist()
        losses = objective.losses(rows, rng, knobs)
        scheduled.minimise(
            sum((objective.WEIGHTS[name] * loss for name, loss in losses.items()), torch.zeros(())), step
        )
        return {name: value.item() for name, value in losses.items()}

    run_loop(
        "routers",
        num_steps,
        train_step,
        {"routers": routers, "optimizer": optimizer},
        run_dir / "routers.pt",
        save_every=75,
        is_main=rank == 0,
    )
    return RouterWeights(routers.eval())
