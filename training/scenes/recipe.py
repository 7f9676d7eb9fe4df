"""The stages that only picture models have: autoencoder, text encoders, encoded scenes, pipeline directory."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image
from torch import nn

from training.backbones import CELLS, Backbone
from training.base import DISTILLATION_SHARE, sample
from training.lesson import Lesson
from training.scenes import text
from training.scenes.lesson import NUM_SCENES, SceneLesson, encode_scenes
from training.scenes.prompts import calibration_scenes
from training.scenes.rendering import render
from training.scenes.scenes import sample_scene
from training.scenes.text import Conditioner
from training.scenes.vae import LATENT_CHANNELS, PictureVae, train_vae


class PictureParts(Protocol):
    """What differs between the tiny picture models. `encoders` are the folders of the text encoders."""

    name: str
    module: str
    text_steps: int
    base_steps: int
    defaults: Mapping[str, float]
    encoders: Sequence[str]

    def new_vae(self) -> PictureVae: ...
    def load_vae(self, folder: Path) -> PictureVae: ...
    def conditioner(self) -> Conditioner: ...
    def new_backbone(self) -> Backbone: ...
    def load_backbone(self, folder: Path) -> Backbone: ...

    def pipeline(self, vae: nn.Module, conditioner: Any, transformer: Any) -> DiffusionPipeline:
        """The family's stock pipeline of these parts."""
        ...


class PictureRecipe:
    """A `training.stages.Recipe` of a picture model's parts."""

    router_steps = 400
    transformer_file = "transformer/diffusion_pytorch_model.safetensors"

    def __init__(self, parts: PictureParts) -> None:
        self.parts = parts
        self.name = parts.name
        self.module = parts.module
        self.base_steps = parts.base_steps
        self.defaults = parts.defaults
        self.new_backbone = parts.new_backbone

    @property
    def preparations(self) -> Mapping[str, Callable[[Path], None]]:
        return {"vae": self._train_vae, "text": self._train_text, "latents": self._encode_scenes}

    def _train_vae(self, run_dir: Path) -> None:
        vae = self.parts.new_vae()
        train_vae(vae, run_dir)
        vae.module.save_pretrained(run_dir / "vae")

    def _train_text(self, run_dir: Path) -> None:
        text.train_text(self.parts.conditioner(), run_dir, num_steps=self.parts.text_steps)

    def _encode_scenes(self, run_dir: Path) -> None:
        encode_scenes(self._vae(run_dir), NUM_SCENES, run_dir / "latents.pt")

    def _vae(self, run_dir: Path) -> PictureVae:
        return self.parts.load_vae(run_dir / "vae")

    def _conditioner(self, run_dir: Path) -> Conditioner:
        conditioner = self.parts.conditioner()
        text.load_text(conditioner, run_dir)
        return conditioner

    def load_backbone(self, checkpoint: Path) -> Backbone:
        return self.parts.load_backbone(checkpoint / "transformer")

    def lesson(self, run_dir: Path, backbone: Backbone, checkpoint: Path | None) -> SceneLesson:
        latents = torch.load(run_dir / "latents.pt", weights_only=True, mmap=True)
        conditioner, is_true = self._conditioner(run_dir), not backbone.has_guidance_embedding
        return SceneLesson(latents, conditioner, backbone.channels, has_fragments=is_true)

    def look(self, run_dir: Path, backbone: Backbone, lesson: Lesson) -> Callable[[int, float], None]:
        conditioner, vae = self._conditioner(run_dir), self._vae(run_dir)

        def look(step: int, share: float) -> None:
            distilled = backbone.has_guidance_embedding and share >= 1 - DISTILLATION_SHARE * 0.8
            draw_samples(backbone, conditioner, vae, run_dir / f"samples-{step:05d}.png", distilled=distilled)

        return look

    def assemble(self, run_dir: Path, backbone: Backbone, checkpoint: Path) -> None:
        pipeline = self.parts.pipeline(self._vae(run_dir).module, self._conditioner(run_dir), backbone.transformer)
        pipeline.to(dtype=torch.float16).save_pretrained(checkpoint)
        for encoder in self.parts.encoders:
            # transformers loads in the type that the configuration names, diffusers in float32: agree on float32.
            path = checkpoint / encoder / "config.json"
            path.write_text(json.dumps(_in_float32(json.loads(path.read_text())), indent=2) + "\n")

    def write_samples(self, folder: Path) -> None:
        conditioner = self.parts.conditioner()
        captions = [conditioner.caption(scene) for scene in calibration_scenes(32)]
        (folder / "calibration_prompts.txt").write_text("\n".join(captions) + "\n")


def _in_float32(config: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _in_float32(value) for key, value in config.items() if isinstance(value, dict) and "dtype" in value}
    return config | inner | {"dtype": "float32"}


@torch.no_grad()
def draw_samples(backbone: Backbone, conditioner: Conditioner, vae: PictureVae, path: Path, *, distilled: bool) -> None:
    """A sheet of 32 held-out prompts: 16 with one object, 8 with two, 8 with three or four."""
    counts = [1] * 16 + [2] * 8 + [3] * 4 + [4] * 4
    scenes = [sample_scene(10**9 + i, held_out=True, num_objects=n, tells_all=True) for i, n in enumerate(counts)]
    told = conditioner.encode([conditioner.caption(scene) for scene in scenes])
    no_prompt = None if distilled else conditioner.encode([""])
    latents = sample(backbone, told, no_prompt, (CELLS * CELLS, 4 * LATENT_CHANNELS), guidance_scale=3.0)
    pictures = vae.decode(FluxPipeline._unpack_latents(latents, 128, 128, 8)).clamp(-1, 1)
    pictures = torch.stack((render(scenes), pictures), 1).flatten(0, 1)  # true scene left, sample right
    sheet = ((pictures + 1) * 127.5).round().byte().view(4, 16, 3, 128, 128).permute(0, 3, 1, 4, 2)
    Image.fromarray(sheet.reshape(4 * 128, 16 * 128, 3).numpy()).save(path)
