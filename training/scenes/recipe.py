"""The training stages of image models: autoencoder, text encoders, encoded scenes, pipeline directory."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image
from torch import nn

from training.backbone import Backbone
from training.base import DISTILLATION_SHARE
from training.lesson import Lesson
from training.sampling import sample
from training.scenes import text
from training.scenes.backbones import CELLS
from training.scenes.lesson import NUM_SCENES, SceneLesson, encode_scenes
from training.scenes.prompts import calibration_scenes
from training.scenes.rendering import render
from training.scenes.scenes import sample_scene
from training.scenes.text import Conditioner
from training.scenes.vae import LATENT_CHANNELS, ImageVae, train_vae


class ImageModel(Protocol):
    """The differences between the tiny image models. `encoders` are the folders of the text encoders.

    For the other attributes see `training.stages.Recipe`.
    """

    name: str
    module: str
    text_steps: int
    base_steps: int
    defaults: Mapping[str, float]
    encoders: Sequence[str]

    def new_vae(self) -> ImageVae: ...
    def load_vae(self, folder: Path) -> ImageVae: ...
    def new_conditioner(self) -> Conditioner: ...
    def load_conditioner(self, checkpoint: Path) -> Conditioner: ...
    def new_backbone(self) -> Backbone: ...
    def load_backbone(self, folder: Path) -> Backbone: ...

    def pipeline(self, vae: nn.Module, conditioner: Any, transformer: Any) -> DiffusionPipeline:
        """The family's stock pipeline with these components."""
        ...


class ImageRecipe:
    """A `training.stages.Recipe` for an image model."""

    router_steps = 400
    transformer_file = "transformer/diffusion_pytorch_model.safetensors"

    def __init__(self, model: ImageModel) -> None:
        self.model = model
        self.name = model.name
        self.module = model.module
        self.base_steps = model.base_steps
        self.defaults = model.defaults
        self.new_backbone = model.new_backbone

    @property
    def preparations(self) -> Mapping[str, Callable[[Path], None]]:
        return {"vae": self._train_vae, "text": self._train_text, "latents": self._encode_scenes}

    def _train_vae(self, run_dir: Path) -> None:
        vae = self.model.new_vae()
        train_vae(vae, run_dir)
        vae.module.save_pretrained(run_dir / "vae")

    def _train_text(self, run_dir: Path) -> None:
        text.train_text(self.model.new_conditioner(), run_dir, num_steps=self.model.text_steps)

    def _encode_scenes(self, run_dir: Path) -> None:
        encode_scenes(self._vae(run_dir), range(NUM_SCENES), run_dir / "latents.pt")

    def _vae(self, run_dir: Path) -> ImageVae:
        return self.model.load_vae(run_dir / "vae")

    def _conditioner(self, run_dir: Path) -> Conditioner:
        conditioner = self.model.new_conditioner()
        text.load_text(conditioner, run_dir)
        return conditioner

    def load_backbone(self, checkpoint: Path) -> Backbone:
        return self.model.load_backbone(checkpoint / "transformer")

    def lesson(self, run_dir: Path, backbone: Backbone, checkpoint: Path | None) -> SceneLesson:
        latents = torch.load(run_dir / "latents.pt", weights_only=True, mmap=True)
        conditioner = self.model.load_conditioner(checkpoint) if checkpoint else self._conditioner(run_dir)
        is_true = not backbone.has_guidance_embedding
        return SceneLesson(latents, conditioner, backbone.channels, has_fragments=is_true)

    def look(self, run_dir: Path, backbone: Backbone, lesson: Lesson) -> Callable[[int, float], None]:
        conditioner, vae = self._conditioner(run_dir), self._vae(run_dir)

        def look(step: int, share: float) -> None:
            distilled = backbone.has_guidance_embedding and share >= 1 - DISTILLATION_SHARE * 0.8
            draw_samples(backbone, conditioner, vae, run_dir / f"samples-{step:05d}.png", distilled=distilled)

        return look

    def assemble(self, run_dir: Path, backbone: Backbone, checkpoint: Path) -> None:
        save_pipeline(self.model, self._vae(run_dir), self._conditioner(run_dir), backbone, checkpoint)

    def write_samples(self, folder: Path) -> None:
        conditioner = self.model.new_conditioner()
        captions = [conditioner.caption(scene) for scene in calibration_scenes(64)]
        (folder / "calibration_prompts.txt").write_text("\n".join(captions) + "\n")


def save_pipeline(
    model: ImageModel, vae: ImageVae, conditioner: Conditioner, backbone: Backbone, checkpoint: Path
) -> None:
    """Write the model directory `checkpoint`, all weights in 16 bits."""
    pipeline = model.pipeline(vae.module, conditioner, backbone.transformer)
    pipeline.to(dtype=torch.float16).save_pretrained(checkpoint)
    for encoder in model.encoders:
        # transformers loads in the type that the configuration names, diffusers in float32. So name float32.
        path = checkpoint / encoder / "config.json"
        path.write_text(json.dumps(_in_float32(json.loads(path.read_text())), indent=2) + "\n")


def _in_float32(config: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _in_float32(value) for key, value in config.items() if isinstance(value, dict) and "dtype" in value}
    return config | inner | {"dtype": "float32"}


@torch.no_grad()
def draw_samples(backbone: Backbone, conditioner: Conditioner, vae: ImageVae, path: Path, *, distilled: bool) -> None:
    """Draw a sheet of 32 held-out prompts: 16 with one object, 8 with two, 8 with three or four.

    Each true scene is on the left of its sample.
    """
    counts = [1] * 16 + [2] * 8 + [3] * 4 + [4] * 4
    scenes = [sample_scene(10**9 + i, held_out=True, num_objects=n, mentions_all=True) for i, n in enumerate(counts)]
    condition = conditioner.encode([conditioner.caption(scene) for scene in scenes])
    no_condition = None if distilled else conditioner.encode([""])
    latents = sample(backbone, condition, no_condition, (CELLS * CELLS, 4 * LATENT_CHANNELS), guidance_scale=3.0)
    images = vae.decode(FluxPipeline._unpack_latents(latents, 128, 128, 8)).clamp(-1, 1)
    images = torch.stack((render(scenes), images), 1).flatten(0, 1)
    sheet = ((images + 1) * 127.5).round().byte().view(4, 16, 3, 128, 128).permute(0, 3, 1, 4, 2)
    Image.fromarray(sheet.reshape(4 * 128, 16 * 128, 3).numpy()).save(path)
