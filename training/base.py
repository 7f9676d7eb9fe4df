"""The tiny diffusion transformers: flow matching on encoded scenes, made ready for elasticity and for guidance.

Three things are taught besides plain flow matching. Half of the batches run with random blocks left out and random MLP
widths (stochastic depth, Huang et al. 2016; nested widths, Yu et al. 2018), so that routers find something to save. A
small head reads from the middle of the network which object each token belongs to (cf. representation alignment, Yu et
al. 2024), which speeds up shape and binding. Where guidance is an input, its embedding is distilled in the last fifth:
the target of a sample with guidance w is moved by (w - 1) times the network's own difference between prompt and no
prompt (cf. Meng et al. 2023). Where it is true guidance, some samples are told a fragment instead of their caption, so
that negative prompts have a meaning.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbones import CELLS, Backbone
from training.loop import run_loop, warm_then_linear
from training.rendering import object_map, render
from training.scenes import COLOURS, SHAPES, Scene, sample_scene, training_scenes
from training.text import Conditioner, Text
from training.vae import LATENT_CHANNELS, PictureVae

NUM_SCENES = 49_152
BATCH_SIZE = 40  # a process
_DISTILLATION_SHARE = 0.2  # of the run, at its end
_EMPTY_SHARE = 0.1  # of the samples have no prompt
_FRAGMENT_SHARE = 0.1  # of the samples, where guidance is true


@torch.no_grad()
def encode_scenes(vae: PictureVae, count: int, path: Path) -> Tensor:
    """Latents of the first `count` training scenes, packed: `(count, 64, 32)` float16. Kept in `path`."""
    if path.exists():
        latents: Tensor = torch.load(path, weights_only=True)
        return latents
    parts = []
    for start in range(0, count, 64):
        pictures = render(list(training_scenes(start, min(64, count - start))))
        with torch.autocast("cpu", torch.bfloat16):
            parts.append(pack(vae.encode(pictures).float()).half())
        if start % 4096 == 0:
            print(f"  encoded {start} of {count} scenes", flush=True)
    latents = torch.cat(parts)
    torch.save(latents, path)
    return latents


def pack(latents: Tensor) -> Tensor:
    """`(batch, channels, height, width)` to 2x2 patches `(batch, height / 2 * width / 2, 4 * channels)`.

    FLUX's and Qwen-Image's order is the same.
    """
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


class WidthMasks:
    """Prefix masks on the hidden neurons of every MLP that may be narrowed, set between calls.

    In training a narrow MLP is a masked one: the same numbers as a sliced one, and one compiled graph for all widths.
    """

    def __init__(self, backbone: Backbone) -> None:
        self._masks: list[tuple[Tensor, int]] = []
        for block in backbone.blocks.values():
            _, last, column = backbone.mlp_layers(block)
            mask = torch.ones(last.in_features)
            last.register_buffer("width_mask", mask, persistent=False)
            last.register_forward_pre_hook(lambda module, args: (args[0] * module.width_mask,))
            self._masks.append((mask, column))

    def set(self, widths: Sequence[float]) -> None:
        """`widths` holds the share of hidden neurons of each block that stays."""
        for (mask, column), width in zip(self._masks, widths, strict=True):
            end = column + int((len(mask) - column) * width)
            mask[:end] = 1
            mask[end:] = 0


class _Objective(nn.Module):
    """One training step's loss for a batch of scenes."""

    def __init__(self, backbone: Backbone, conditioner: Conditioner) -> None:
        super().__init__()
        self.backbone = backbone
        self.transformer = backbone.transformer
        self.object_head = nn.Linear(backbone.channels, len(SHAPES) + len(COLOURS) + 2)
        self.conditioner = conditioner
        self.widths = WidthMasks(backbone)
        with torch.no_grad():
            self.no_prompt = conditioner.encode([""])

    def velocity(
        self, latents: Tensor, timestep: Tensor, guidance: Tensor, text: Text, skipped: set[int]
    ) -> tuple[Tensor, Tensor]:
        """Returns the velocity and the middle hidden states."""
        streams = self.backbone.prologue(latents, timestep, guidance, text)
        middle = streams.hidden_states
        for i, block in enumerate(self.backbone.blocks.values()):
            if i not in skipped:
                text_stream, image_stream = self.backbone.call_block(block, streams)
                streams = replace(streams, hidden_states=image_stream, encoder_hidden_states=text_stream)
            if i == len(self.backbone.blocks) // 2 - 1:
                middle = streams.hidden_states
        return self.backbone.epilogue(streams), middle

    def forward(self, clean: Tensor, scenes: Sequence[Scene], rng: torch.Generator, guided: bool) -> tuple[Tensor, ...]:
        """Returns the flow-matching loss and the auxiliary one. `clean` is `(batch, tokens, channels)`."""
        batch = len(scenes)
        num_blocks = len(self.backbone.blocks)
        noise = torch.randn(clean.shape, generator=rng)
        # Stratified, so that every batch sees the whole range of noise levels.
        uniform = (torch.randperm(batch, generator=rng) + torch.rand(batch, generator=rng)) / batch
        timestep = torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)))
        latents = torch.lerp(clean, noise, timestep[:, None, None])
        target = noise - clean
        with torch.no_grad():
            prompts, told = self._prompts(scenes, rng)
            text = self.conditioner.encode(prompts)
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
        with torch.autocast("cpu", torch.bfloat16):
            velocity, middle = self.velocity(latents, timestep, guidance, text, skipped)
            logits = self.object_head(middle)
        return F.mse_loss(velocity.float(), target), self._object_loss(logits.float(), scenes, told)

    def _prompts(self, scenes: Sequence[Scene], rng: torch.Generator) -> tuple[list[str], Tensor]:
        """What each sample is told, and whether that is its whole caption, `(batch,)`."""
        fragments = 0.0 if self.backbone.has_guidance_embedding else _FRAGMENT_SHARE
        draw = torch.rand(len(scenes), generator=rng).tolist()
        words = random.Random(draw[0])
        prompts = [
            ""
            if x < _EMPTY_SHARE
            else scene.fragment(words)
            if x < _EMPTY_SHARE + fragments
            else self.conditioner.caption(scene)
            for x, scene in zip(draw, scenes, strict=True)
        ]
        return prompts, torch.tensor(draw) >= _EMPTY_SHARE + fragments

    @torch.no_grad()
    def _guidance_shift(
        self, latents: Tensor, timestep: Tensor, guidance: Tensor, text: Text, told: Tensor, half: int
    ) -> Tensor:
        """(w - 1) (v(prompt) - v(no prompt)), with the network as it is, for the first `half` rows.

        Both halves go in one call, which keeps the compiled batch size.
        """
        pair = [torch.cat((part[:half], part[:half])) for part in (latents, timestep)]
        texts = text.rows(slice(0, half)).join(self.no_prompt.repeat(half))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self.velocity(pair[0], pair[1], torch.ones(2 * half), texts, set())[0].float()
        shift = (guidance[:half] - 1) * told[:half]
        return shift[:, None, None] * (velocity[:half] - velocity[half:])

    def _object_loss(self, logits: Tensor, scenes: Sequence[Scene], told: Tensor) -> Tensor:
        slot = object_map(scenes, CELLS).flatten(1)
        shape_of = torch.full((len(scenes), 5), len(SHAPES))
        colour_of = torch.full((len(scenes), 5), len(COLOURS))
        for i, scene in enumerate(scenes):
            for k, thing in enumerate(scene.objects):
                shape_of[i, k], colour_of[i, k] = SHAPES.index(thing.shape), COLOURS.index(thing.colour)
        slot = torch.where(slot < 0, 4, slot)
        logits, slot = logits[told], slot[told]
        by_shape, by_colour = logits.split((len(SHAPES) + 1, len(COLOURS) + 1), dim=-1)
        shape_loss = F.cross_entropy(by_shape.flatten(0, 1), shape_of[told].gather(1, slot).flatten())
        return shape_loss + F.cross_entropy(by_colour.flatten(0, 1), colour_of[told].gather(1, slot).flatten())


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
    """Muon for the matrices inside the blocks, AdamW for everything else. Modulations count as everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_modulation = "norm" in name or "_mod." in name
            inside = "transformer_blocks" in name and parameter.ndim == 2 and not is_modulation
            (matrices if inside else others).append(parameter)
    return (
        torch.optim.Muon(matrices, lr=matrix_lr, momentum=0.95, weight_decay=0.0),
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
    vae: PictureVae,
    conditioner: Conditioner,
    *,
    rank: int,
    num_processes: int,
    num_steps: int,
) -> None:
    """Train `backbone`, or resume, as process `rank` of `num_processes`; `average_of` gets its moving average."""
    latents = torch.load(run_dir / "latents.pt", weights_only=True, mmap=True)
    objective = _Objective(backbone, conditioner)
    average = MovingAverage(backbone.transformer, average_of.transformer, decay=0.999)
    optimizers = split_optimizers(objective, matrix_lr=0.05, lr=2e-3)
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for p in objective.parameters() if p.requires_grad]
    backbone.transformer.compile_repeated_blocks(dynamic=False)
    global_batch = BATCH_SIZE * num_processes

    def train_step(step: int) -> Mapping[str, float]:
        rng = torch.Generator().manual_seed(step * 64 + rank)
        epoch, offset = divmod(step * global_batch, len(latents) - global_batch)
        order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(epoch))
        rows = order[offset + rank * BATCH_SIZE : offset + (rank + 1) * BATCH_SIZE].tolist()
        scenes = [sample_scene(row) for row in rows]
        guided = backbone.has_guidance_embedding and step >= num_steps * (1 - _DISTILLATION_SHARE)
        flow, auxiliary = objective(latents[rows].float(), scenes, rng, guided)
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
        return {"flow": flow.item(), "objects": auxiliary.item()}

    def look(step: int) -> None:
        if rank == 0:
            distilled = backbone.has_guidance_embedding and step >= num_steps * (1 - _DISTILLATION_SHARE * 0.8)
            draw_samples(average_of, conditioner, vae, run_dir / f"samples-{step:05d}.png", distilled=distilled)

    run_loop(
        "transformer",
        num_steps,
        train_step,
        {
            "objective": _WithoutCompilation(objective),
            "average": average,
            "matrices": optimizers[0],
            "others": optimizers[1],
        },
        run_dir / "base.pt",
        save_every=500,
        look=look,
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


@torch.no_grad()
def sample(
    backbone: Backbone,
    text: Text,
    no_prompt: Text | None,
    *,
    guidance_scale: float,
    num_steps: int = 20,
    seed: int = 0,
) -> Tensor:
    """Euler sampling for looks during training. With `no_prompt` guidance is classifier-free, else distilled."""
    batch = len(text.embeds)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, CELLS * CELLS, 4 * LATENT_CHANNELS, generator=generator)
    sigmas = torch.linspace(1, 0, num_steps + 1)
    scale = torch.full((batch,), 1.0 if no_prompt else guidance_scale)

    def velocity(which: Text, sigma: Tensor) -> Tensor:
        streams = backbone.prologue(latents, sigma.expand(batch), scale, which)
        for block in backbone.blocks.values():
            text_stream, image_stream = backbone.call_block(block, streams)
            streams = replace(streams, hidden_states=image_stream, encoder_hidden_states=text_stream)
        return backbone.epilogue(streams)

    for sigma, following in pairwise(sigmas):
        step = velocity(text, sigma)
        if no_prompt:
            other = velocity(no_prompt.repeat(batch), sigma)
            step = other + guidance_scale * (step - other)
        latents = latents + (following - sigma) * step
    return latents


@torch.no_grad()
def draw_samples(backbone: Backbone, conditioner: Conditioner, vae: PictureVae, path: Path, *, distilled: bool) -> None:
    """A sheet of 32 held-out prompts: 16 with one object, 8 with two, 8 with three or four."""
    counts = [1] * 16 + [2] * 8 + [3] * 4 + [4] * 4
    scenes = [sample_scene(10**9 + i, held_out=True, num_objects=n, tells_all=True) for i, n in enumerate(counts)]
    text = conditioner.encode([conditioner.caption(scene) for scene in scenes])
    no_prompt = None if distilled else conditioner.encode([""])
    latents = sample(backbone, text, no_prompt, guidance_scale=3.0)
    pictures = vae.decode(FluxPipeline._unpack_latents(latents, 128, 128, 8)).clamp(-1, 1)
    pictures = torch.stack((render(scenes), pictures), 1).flatten(0, 1)  # true scene left, sample right
    sheet = ((pictures + 1) * 127.5).round().byte().view(4, 16, 3, 128, 128).permute(0, 3, 1, 4, 2)
    Image.fromarray(sheet.reshape(4 * 128, 16 * 128, 3).numpy()).save(path)
