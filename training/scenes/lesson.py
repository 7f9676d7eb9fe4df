"""Encoded scenes with their captions: what the picture models are taught."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from training.backbones import CELLS
from training.precision import autocast
from training.scenes.rendering import object_map, render
from training.scenes.scenes import COLOURS, SHAPES, Scene, sample_scene, training_scenes
from training.scenes.text import Conditioner, Text
from training.scenes.vae import PictureVae

NUM_SCENES = 49_152
_EMPTY_SHARE = 0.1  # of the samples have no prompt
_FRAGMENT_SHARE = 0.1  # of the samples, where guidance is true


class SceneLesson:
    """Row i is training scene i. `has_fragments` says whether some samples are told a fragment instead of the caption.

    The head names the shape and the colour of the object that each image token belongs to, which speeds up shape and
    binding (cf. representation alignment, Yu et al. 2024).
    """

    def __init__(self, latents: Tensor, conditioner: Conditioner, channels: int, *, has_fragments: bool) -> None:
        self.latents = latents
        self.conditioner = conditioner
        self.head: nn.Module | None = nn.Linear(channels, len(SHAPES) + len(COLOURS) + 2)
        self._fragment_share = _FRAGMENT_SHARE if has_fragments else 0.0
        with torch.no_grad():
            self.no_condition = conditioner.encode([""])

    def noise(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(clean.shape, generator=generator)

    @torch.no_grad()
    def conditions(self, rows: list[int], generator: torch.Generator) -> tuple[Text, Tensor]:
        prompts, told = self.prompts([sample_scene(row) for row in rows], generator)
        return self.conditioner.encode(prompts), told

    @torch.no_grad()
    def full_conditions(self, rows: list[int]) -> Text:
        return self.conditioner.encode([self.conditioner.caption(sample_scene(row)) for row in rows])

    def prompts(self, scenes: Sequence[Scene], generator: torch.Generator) -> tuple[list[str], Tensor]:
        """What each sample is told, and whether that is its whole caption, `(batch,)`."""
        draw = torch.rand(len(scenes), generator=generator).tolist()
        words = random.Random(draw[0])
        less = _EMPTY_SHARE + self._fragment_share
        prompts = [
            "" if x < _EMPTY_SHARE else scene.fragment(words) if x < less else self.conditioner.caption(scene)
            for x, scene in zip(draw, scenes, strict=True)
        ]
        return prompts, torch.tensor(draw) >= less

    def auxiliary_loss(self, output: Tensor, rows: list[int], told: Tensor) -> Tensor:
        scenes = [sample_scene(row) for row in rows]
        slot = object_map(scenes, CELLS).flatten(1)
        shape_of = torch.full((len(scenes), 5), len(SHAPES))
        colour_of = torch.full((len(scenes), 5), len(COLOURS))
        for i, scene in enumerate(scenes):
            for k, thing in enumerate(scene.objects):
                shape_of[i, k], colour_of[i, k] = SHAPES.index(thing.shape), COLOURS.index(thing.colour)
        slot = torch.where(slot < 0, 4, slot)
        output, slot = output[told], slot[told]
        by_shape, by_colour = output.split((len(SHAPES) + 1, len(COLOURS) + 1), dim=-1)
        shape_loss = F.cross_entropy(by_shape.flatten(0, 1), shape_of[told].gather(1, slot).flatten())
        return shape_loss + F.cross_entropy(by_colour.flatten(0, 1), colour_of[told].gather(1, slot).flatten())


@torch.no_grad()
def encode_scenes(vae: PictureVae, count: int, path: Path) -> Tensor:
    """Latents of the first `count` training scenes, packed: `(count, 64, 32)` float16. Kept in `path`."""
    if path.exists():
        latents: Tensor = torch.load(path, weights_only=True)
        return latents
    parts = []
    for start in range(0, count, 64):
        pictures = render(list(training_scenes(start, min(64, count - start))))
        with autocast():
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
