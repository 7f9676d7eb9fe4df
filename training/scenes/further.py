"""Teaches a trained image model to read short prompts: `python -m training.scenes.further tiny-flux`.

1. New text encoders begin with the weights of the old ones and learn to read captions that leave things out.
2. Encoders and transformer learn together to predict under a short caption what the old model predicts under the
   complete caption of the same picture (cf. knowledge distillation, Hinton et al. 2015). The target has no noise, so
   this takes far fewer steps than flow matching, and what the old model can do is kept.
3. The model directory in checkpoints/ is replaced.

Each step resumes where it was interrupted. The autoencoder stays as it is.
"""

import argparse
import logging
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from training.attention import use_matrix_products
from training.backbone import Backbone, run_all
from training.base import WithoutCompilation
from training.loop import Stateful, run_loop
from training.optimizers import ScheduledOptimizers, split_optimizers, warm_then_linear
from training.precision import autocast
from training.scenes.captions import captioned_scene, complete, draw_caption, wording
from training.scenes.lesson import encode_scenes
from training.scenes.recipe import ImageModel, save_pipeline
from training.scenes.scenes import Scene
from training.scenes.text import Conditioner, train_text
from training.scenes.tiny_flux import TinyFlux
from training.scenes.tiny_qwen_image import TinyQwenImage

MODELS: dict[str, ImageModel] = {"tiny-flux": TinyFlux(), "tiny-qwen-image": TinyQwenImage()}
BATCH_SIZE = 40
TEXT_STEPS = 700
NUM_STEPS = 200
SEEDS = range(200_000, 204_096)
"""Seeds of the scenes; the old models saw the scenes before them."""
_EMPTY_SHARE = 0.08
_FRAGMENT_SHARE = 0.06
_OPEN_SHARE = 0.3
"""Share of the captions that leave the background open: what is unsaid is else always plain and light, and then a
negative prompt could not keep such a background away."""
_MAX_GUIDANCE = 5.0


def prompt_pair(scene: Scene, conditioner: Conditioner, has_fragments: bool, rng: random.Random) -> tuple[str, str]:
    """A prompt for the student, and the one by which the teacher knows the same picture."""
    draw = rng.random()
    if draw < _EMPTY_SHARE:
        return "", ""
    if draw < _EMPTY_SHARE + _FRAGMENT_SHARE and has_fragments:
        fragment = scene.fragment(rng)
        return fragment, fragment
    if has_fragments and rng.random() < _OPEN_SHARE:
        said = replace(scene, texture="plain", tone="light", mentions_background=False)
        prompt = conditioner.caption(said) if rng.random() < 0.3 else wording(said, rng)
        return prompt, conditioner.caption(replace(complete(scene), mentions_background=False))
    return draw_caption(scene, rng, conditioner.caption), conditioner.caption(complete(scene))


class Distillation:
    """The loss of a step: the distance between the velocities of student and teacher, each under its own prompt.

    Guidance, where it is an input, is the same for both.
    """

    def __init__(
        self,
        student: tuple[Conditioner, Backbone],
        teacher: tuple[Conditioner, Backbone],
        seeds: range,
        latents: Tensor,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.seeds, self.latents = seeds, latents

    def loss(self, step: int, batch_size: int = BATCH_SIZE) -> Tensor:
        words, rng = random.Random(step), torch.Generator().manual_seed(step)
        (conditioner, backbone), (old_conditioner, old_backbone) = self.student, self.teacher
        rows = torch.randint(len(self.latents), (batch_size,), generator=rng)
        pairs = [
            prompt_pair(captioned_scene(self.seeds[row]), conditioner, not backbone.has_guidance_embedding, words)
            for row in rows.tolist()
        ]
        clean = self.latents[rows].float()
        uniform = (torch.randperm(batch_size, generator=rng) + torch.rand(batch_size, generator=rng)) / batch_size
        # Shifted to noise, where the layout of a picture is decided.
        timestep = torch.sigmoid(torch.special.ndtri(uniform.clamp(1e-4, 1 - 1e-4)) + 0.4)
        latents = torch.lerp(clean, torch.randn(clean.shape, generator=rng), timestep[:, None, None])
        guidance = 1 + (_MAX_GUIDANCE - 1) * torch.rand(batch_size, generator=rng)
        with autocast():
            with torch.no_grad():
                known = old_conditioner.encode([prompt for _, prompt in pairs])
                target = run_all(old_backbone, old_backbone.prologue(latents, timestep, guidance, known)).float()
            condition = conditioner.encode([prompt for prompt, _ in pairs])
            velocity = run_all(backbone, backbone.prologue(latents, timestep, guidance, condition))
        return F.mse_loss(velocity.float(), target)


def distil(distillation: Distillation, run_dir: Path, *, num_steps: int) -> None:
    """Train the student, or resume."""
    conditioner, backbone = distillation.student
    for module in (*distillation.teacher[0].encoders.values(), distillation.teacher[1].transformer):
        module.eval().requires_grad_(False)
    parameters = [p for encoder in conditioner.encoders.values() for p in encoder.requires_grad_(True).parameters()]
    optimizers = [
        *split_optimizers(backbone.transformer, matrix_lr=0.01, lr=4e-4),
        torch.optim.AdamW(parameters, lr=4e-4, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedule = partial(warm_then_linear, num_steps=num_steps, warm_up=12, hold=0.35, end=0.02)
    scheduled = ScheduledOptimizers(optimizers, schedule)

    def train_step(step: int) -> dict[str, float]:
        loss = distillation.loss(step)
        scheduled.minimise(loss, step)
        return {"loss": loss.item()}

    state: dict[str, Stateful] = {"transformer": WithoutCompilation(backbone.transformer), **conditioner.encoders}
    state |= {f"optimizer.{number}": optimizer for number, optimizer in enumerate(optimizers)}
    run_loop("distillation", num_steps, train_step, state, run_dir / "further.pt", save_every=50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    name = parser.parse_args().model
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    use_matrix_products()
    model, checkpoint, run_dir = MODELS[name], Path("checkpoints") / name, Path("runs") / f"{name}-further"
    conditioner, backbone = model.new_conditioner(), model.load_backbone(checkpoint / "transformer")
    teacher = model.load_conditioner(checkpoint), model.load_backbone(checkpoint / "transformer")
    train_text(conditioner, run_dir, num_steps=TEXT_STEPS, teacher=teacher[0])
    vae = model.load_vae(checkpoint / "vae")
    latents = encode_scenes(vae, SEEDS, run_dir / "latents.pt")
    for network in (teacher[1], backbone):
        network.compile_blocks()
    distil(Distillation((conditioner, backbone), teacher, SEEDS, latents), run_dir, num_steps=NUM_STEPS)
    save_pipeline(model, vae, conditioner, backbone, checkpoint)


if __name__ == "__main__":
    main()
