"""Routers for the tiny models: which blocks a sample needs at a step, and how wide. The backbone is frozen.

After the recipe of Elastic Diffusion Transformer (arXiv 2602.13993): hard decisions forward, soft gradients backward,
every block computed for every sample so that a closed gate still learns. Ours differs where serving wants a whole range
of budgets from one set of routers: each batch draws a skip threshold and a width bias, and the mean gate and mean width
that it is held to follow from them. Means are over the batch, so which samples and which noise levels get more is free.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.elastic.plan import MLP_WIDTHS
from models.elastic.router import RouterStack
from models.elastic.streams import Streams
from models.families.wrapping import mlp_name, permute_neurons
from models.weights import RouterWeights
from training.backbones import Backbone
from training.base import average_gradients, run_all
from training.lesson import Lesson
from training.loop import run_loop, warm_then_linear
from training.precision import autocast

BATCH_SIZE = 32  # a process
HIDDEN = 32
MAX_WIDTH_BIAS = 4.0
GUIDANCE_SCALE = 3.0
"""The scale at which true guidance is trained for: the tiny models' default."""
SEED = 6


@dataclass(frozen=True, slots=True)
class Knobs:
    """One batch's settings: what serving will set in a Policy."""

    skip_threshold: float
    width_bias: float

    @property
    def target_gate(self) -> float:
        """The share of blocks that should run: nearly all at threshold 0, a fifth at 1."""
        return 1 - 0.8 * self.skip_threshold

    @property
    def target_width(self) -> float:
        """The mean MLP width: nearly full without bias, a bit over a third at the strongest."""
        return 0.97 - 0.6 * self.width_bias / MAX_WIDTH_BIAS


def elastic_forward(
    backbone: Backbone,
    routers: RouterStack,
    streams: Streams,
    knobs: Knobs,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every block for every sample, gated and masked by its router's hard decision, with soft gradients.

    Returns velocity `(batch, tokens, channels)`, gates `(blocks, batch)` and widths `(blocks, batch)`.
    """
    gates, widths = [], []
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
        width = hard_width(scores.width_logits + lowered)
        for mlp in backbone.mlps(block).values():
            mlp.last.width_mask = prefix_mask(width, mlp.num_hidden, mlp.column)
        after = backbone.call_block(block, streams)
        text, image = (x + gate[:, None, None] * (y - x) for x, y in zip(before, after, strict=True))
        streams = backbone.leave(i, replace(streams, hidden_states=image, encoder_hidden_states=text))
        gates.append(gate)
        widths.append(width @ shares)
    return backbone.epilogue(streams), torch.stack(gates), torch.stack(widths)


def hard_gate(depth_logits: Tensor, skip_threshold: float) -> Tensor:
    """0 or 1, `(batch,)`, with the gradient of the probability.

    Decides as serving does: a probability of exactly the threshold is open. The official training (Elastic-DiT at
    ce39f1d) has it closed, unlike its own inference.
    """
    soft = torch.sigmoid(depth_logits)
    return (soft >= skip_threshold).float() + soft - soft.detach()


def hard_width(width_logits: Tensor) -> Tensor:
    """One-hot choice of MLP_WIDTHS `(batch, 4)`, with the gradient of the probabilities."""
    soft = torch.softmax(width_logits, dim=1)
    return F.one_hot(soft.argmax(1), len(MLP_WIDTHS)) + soft - soft.detach()


def prefix_mask(width: Tensor, hidden: int, column: int) -> Tensor:
    """Mask `(batch, 1, column + hidden)` from one-hot widths `(batch, 4)`; the first `column` features always stay."""
    quarter = hidden // len(MLP_WIDTHS)
    # Neuron group k stays at width indices k and above.
    kept = width.flip(1).cumsum(1).flip(1).repeat_interleave(quarter, dim=1)
    return torch.cat((kept.new_ones(len(kept), column), kept), dim=1)[:, None]


def install_masks(backbone: Backbone) -> None:
    """Let every MLP that may be narrowed multiply its hidden neurons by its `width_mask`."""
    for block in backbone.blocks.values():
        for mlp in backbone.mlps(block).values():
            mlp.last.width_mask = torch.ones(())
            mlp.last.register_forward_pre_hook(lambda module, args: (args[0] * module.width_mask,))


class RouterObjective:
    """One training step's losses for a batch of samples."""

    def __init__(self, backbone: Backbone, lesson: Lesson, routers: RouterStack) -> None:
        self.backbone = backbone
        self.lesson = lesson
        self.routers = routers
        backbone.transformer.requires_grad_(False)
        install_masks(backbone)

    def losses(self, rows: list[int], rng: torch.Generator, knobs: Knobs) -> dict[str, Tensor]:
        """Flow-matching error, distance to the dense prediction, distance of mean gate and mean width from the target.

        `rows` are samples of the lesson. Where guidance is true, the second half of the batch are the first half's
        unconditional branches, and the distance to the dense prediction counts after guidance too.
        """
        batch, half = len(rows), len(rows) // 2
        paired = not self.backbone.has_guidance_embedding
        if paired:
            rows = rows[:half] * 2
        clean = self.lesson.latents[rows].float()
        noise = self.lesson.noise(clean, rng)
        # Noise levels as sampling visits them: evenly, stratified over the batch.
        timestep = (torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)) / batch
        if paired:
            noise, timestep = (torch.cat((part[:half], part[:half])) for part in (noise, timestep))
        latents = torch.lerp(clean, noise, timestep[:, None, None])
        # Half without guidance, for which the data are the right answer; half as served, where the dense model's is.
        guidance = 1 + 4 * torch.rand(batch, generator=rng)
        guidance[:half] = 1
        with torch.no_grad():
            if paired:
                text = self.lesson.full_conditions(rows[:half]).join(self.lesson.no_condition.repeat(half))
            else:
                text = self.lesson.full_conditions(rows)
            streams = self.backbone.prologue(latents, timestep, guidance, text)
            with autocast():
                dense = self._dense(streams).float()
        with autocast():
            velocity, gates, widths = elastic_forward(self.backbone, self.routers, streams, knobs)
        error = velocity.float() - dense
        distance = error.square().mean()
        if paired:
            guided = GUIDANCE_SCALE * error[:half] - (GUIDANCE_SCALE - 1) * error[half:]
            # As large as the plain distance where the branches' errors have nothing to do with each other.
            distance = (distance + guided.square().mean() / (GUIDANCE_SCALE**2 + (GUIDANCE_SCALE - 1) ** 2)) / 2
        ran = gates.detach()
        mean_width = (widths * ran).sum() / ran.sum().clamp(min=1)
        return {
            "flow": F.mse_loss(velocity.float()[:half], (noise - clean)[:half]),
            "dense": distance,
            "gate": (gates.mean() - knobs.target_gate).square(),
            "width": (mean_width - knobs.target_width).square(),
        }

    def _dense(self, streams: Streams) -> Tensor:
        for block in self.backbone.blocks.values():
            for mlp in self.backbone.mlps(block).values():
                mlp.last.width_mask = torch.ones(())
        return run_all(self.backbone, streams)


def neuron_orders(objective: RouterObjective, rows: list[int], rng: torch.Generator) -> dict[str, Tensor]:
    """Hidden neurons of each MLP by importance, `(hidden,)` old positions, the most important first.

    A neuron matters by its mean |activation| times the norm of its output column, over all tokens of the samples.
    """
    importance: dict[str, Tensor] = {}
    handles = []
    for name, block in objective.backbone.blocks.items():
        for part, mlp in objective.backbone.mlps(block).items():
            order_name = mlp_name(name, part)

            def measure(
                module: nn.Linear, args: tuple[Tensor], name: str = order_name, column: int = mlp.column
            ) -> None:
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
    *,
    rank: int,
    num_processes: int,
    num_steps: int,
) -> RouterWeights:
    """Train, or resume, as process `rank` of `num_processes`, for MLP neurons in the order of their importance."""
    torch.manual_seed(SEED)
    routers = RouterStack(len(backbone.blocks), backbone.channels, HIDDEN)
    objective = RouterObjective(backbone, lesson, routers)
    orders = neuron_orders(objective, list(range(2 * BATCH_SIZE)), torch.Generator().manual_seed(SEED))
    permute_neurons(backbone.blocks, orders, backbone.mlps)
    optimizer = torch.optim.AdamW(routers.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0)
    parameters = list(routers.parameters())

    def train_step(step: int) -> Mapping[str, float]:
        rng = torch.Generator().manual_seed(SEED * 10**6 + step * 64 + rank)
        threshold, bias = torch.rand(2, generator=rng).tolist()
        knobs = Knobs(0.02 + 0.96 * threshold, MAX_WIDTH_BIAS * bias)
        rows = torch.randint(len(lesson.latents), (BATCH_SIZE,), generator=rng).tolist()
        losses = objective.losses(rows, rng, knobs)
        loss = losses["flow"] + losses["dense"] + 8 * (losses["gate"] + losses["width"])
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters, num_processes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * warm_then_linear(step, num_steps, warm_up=20, hold=0.5, end=0.02)
        optimizer.step()
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
    return RouterWeights(routers.eval(), orders)
