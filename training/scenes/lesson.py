"""The lesson of the image models: encoded scenes and their captions."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from training.lesson import Condition
from training.precision import autocast
from training.scenes.backbones import CELLS
from training.scenes.captions import captioned_scene, draw_caption
from training.scenes.rendering import object_map, render
from training.scenes.scenes import COLOURS, SHAPES, Scene
from training.scenes.text import Conditioner
from training.scenes.vae import ImageVae

NUM_SCENES = 49_152
_EMPTY_SHARE = 0.1
"""Share of the samples with an empty prompt."""
_FRAGMENT_SHARE = 0.1
"""Share of the samples with a fragment of their caption, if guidance is classifier-free."""


class SceneLesson:
    """A `training.lesson.Lesson` whose row i is `captioned_scene(i)`.

    With `has_fragments`, some samples get a fragment of their caption as the prompt. The head predicts shape and colour
    of the object that each image token belongs to (cf. representation alignment, Yu et al. 2024). The transformer then
    learns shapes and their colours sooner.
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
    def conditions(self, rows: list[int], generator: torch.Generator) -> tuple[Condition, Tensor]:
        prompts, is_complete = self.prompts([captioned_scene(row) for row in rows], generator)
        return self.conditioner.encode(prompts), is_complete

    @torch.no_grad()
    def full_conditions(self, rows: list[int]) -> Condition:
        caption = self.conditioner.caption
        prompts = [draw_caption(captioned_scene(row), random.Random(row), caption) for row in rows]
        return self.conditioner.encode(prompts)

    def prompts(self, scenes: Sequence[Scene], generator: torch.Generator) -> tuple[list[str], Tensor]:
        """A prompt for each scene, and whether it is a caption, no fragment and not empty, `(batch,)`."""
        draw = torch.rand(len(scenes), generator=generator).tolist()
        words = random.Random(draw[0])
        incomplete = _EMPTY_SHARE + self._fragment_share
        prompts = [
            ""
            if x < _EMPTY_SHARE
            else scene.fragment(words)
            if x < incomplete
            else draw_caption(scene, words, self.conditioner.caption)
            for x, scene in zip(draw, scenes, strict=True)
        ]
        return prompts, torch.tensor(draw) >= incomplete

    def auxiliary_loss(self, output: Tensor, rows: list[int], is_complete: Tensor) -> Tensor:
        scenes = [captioned_scene(row) for row in rows]
        slot = object_map(scenes, CELLS).flatten(1)
        shape_of = torch.full((len(scenes), 5), len(SHAPES))
        colour_of = torch.full((len(scenes), 5), len(COLOURS))
        for i, scene in enumerate(scenes):
            for k, thing in enumerate(scene.objects):
                shape_of[i, k], colour_of[i, k] = SHAPES.index(thing.shape), COLOURS.index(thing.colour)
        slot = torch.where(slot < 0, 4, slot)
        output, slot = output[is_complete], slot[is_complete]
        by_shape, by_colour = output.split((len(SHAPES) + 1, len(COLOURS) + 1), dim=-1)
        shape_loss = F.cross_entropy(by_shape.flatten(0, 1), shape_of[is_complete].gather(1, slot).flatten())
        return shape_loss + F.cross_entropy(by_colour.flatten(0, 1), colour_of[is_complete].gather(1, slot).flatten())


@torch.no_grad()
def encode_scenes(vae: ImageVae, seeds: range, path: Path) -> Tensor:
    """Packed latents of the captioned scenes with these seeds, `(scenes, 64, 32)` float16, stored in `path`."""
    if path.exists():
        latents: Tensor = torch.load(path, weights_only=True)
        return latents
    chunks = []
    for start in range(0, len(seeds), 16):
        images = render([captioned_scene(seed) for seed in seeds[start : start + 16]])
        with autocast():
            encoded = vae.encode(images.contiguous(memory_format=torch.channels_last))
            chunks.append(pack(encoded.float()).half())
        if start % 4096 == 0:
            print(f"  encoded {start} of {len(seeds)} scenes", flush=True)
    latents = torch.cat(chunks)
    torch.save(latents, path)
    return latents


def pack(latents: Tensor) -> Tensor:
    """`(batch, channels, height, width)` to 2x2 patches `(batch, height / 2 * width / 2, 4 * channels)`.

    FLUX and Qwen-Image use the same order.
    """
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed
