"""Trains tiny-hunyuan3d from scratch: `python -m training.solids.tiny_hunyuan3d` (see `training.stages`)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from models.calibration import BUILT_IN_SAMPLES
from models.families.hunyuan3d.checkpoint import load_checkpoint
from models.families.hunyuan3d.conditioner import SingleImageEncoder
from models.families.hunyuan3d.plain_dit import HunYuanDiTPlain
from models.families.hunyuan3d.shape_vae import ShapeVAE
from training import stages
from training.backbone import Backbone
from training.lesson import Condition, Lesson
from training.sampling import sample
from training.solids.backbone import HUNYUAN3D_PARAMS, Hunyuan3DBackbone, build_hunyuan3d
from training.solids.image_encoder import CONDITIONER_PARAMS, build_conditioner, train_conditioner
from training.solids.images import (
    SETTINGS,
    SIDE,
    image_file,
    prepared,
    training_images,
    training_part_maps,
    training_surface_maps,
)
from training.solids.lesson import NUM_SOLIDS, SolidLesson, encode_solids, read_lesson
from training.solids.rendering import render
from training.solids.sampling import sample_solids
from training.solids.shape_vae import (
    LATENT_CHANNELS,
    NUM_LATENTS,
    VAE_PARAMS,
    build_shape_vae,
    field_iou,
    train_shape_vae,
)
from training.solids.solids import SolidBatch
from training.solids.surfaces import PointPool

_CONDITIONER_STEPS = 24_500
_CALIBRATION = 2_000_000_000
_NUM_CALIBRATION = 64
_NUM_LOOKED_AT = 32


class TinyHunyuan3D:
    """A `training.stages.Recipe`."""

    name = "tiny-hunyuan3d"
    module = "training.solids.tiny_hunyuan3d"
    base_steps = 4500
    router_steps = 600
    defaults: Mapping[str, float] = {"num_inference_steps": 20, "guidance_scale": 2.0, "octree_resolution": 128}
    transformer_file = "model.fp16.safetensors"
    built_in = BUILT_IN_SAMPLES / "pictures"

    @property
    def preparations(self) -> Mapping[str, Callable[[Path], None]]:
        return {"vae": self._train_vae, "conditioner": self._train_conditioner, "latents": self._encode_solids}

    def _train_vae(self, run_dir: Path) -> None:
        vae = build_shape_vae()
        train_shape_vae(vae, run_dir)
        torch.save(vae.state_dict(), run_dir / "shape_vae.pt")

    def _train_conditioner(self, run_dir: Path) -> None:
        # Draw the data before both processes start.
        training_images(run_dir / "solids", NUM_SOLIDS)
        training_surface_maps(run_dir / "solids", NUM_SOLIDS)
        training_part_maps(run_dir / "solids", NUM_SOLIDS)
        PointPool(run_dir / "solids", NUM_SOLIDS)
        stages.in_processes(_train_conditioner, run_dir)

    def _encode_solids(self, run_dir: Path) -> None:
        encode_solids(_trained_vae(run_dir), run_dir)

    def new_backbone(self) -> Hunyuan3DBackbone:
        return Hunyuan3DBackbone(build_hunyuan3d())

    def load_backbone(self, checkpoint: Path) -> Hunyuan3DBackbone:
        denoiser = load_checkpoint(checkpoint, "cpu", torch.float32).denoiser
        assert isinstance(denoiser, HunYuanDiTPlain)
        return Hunyuan3DBackbone(denoiser)

    def lesson(self, run_dir: Path, backbone: Backbone, checkpoint: Path | None) -> SolidLesson:
        if checkpoint:
            return read_lesson(run_dir, load_checkpoint(checkpoint, "cpu", torch.float32).conditioner)
        return read_lesson(run_dir, _trained_conditioner(run_dir))

    def look(self, run_dir: Path, backbone: Backbone, lesson: Lesson) -> Callable[[int, float], None]:
        vae = _trained_vae(run_dir)
        solids = sample_solids(range(10**9, 10**9 + _NUM_LOOKED_AT), held_out=True)
        images = prepared(render(solids, range(len(solids)), SIDE))

        @torch.no_grad()
        def look(step: int, share: float) -> None:
            assert isinstance(lesson, SolidLesson)
            condition = Condition(lesson.conditioner(images), None, None)
            for scale in (1.0, 2.0, 3.0):
                latents = sample(
                    backbone, condition, lesson.no_condition, (NUM_LATENTS, LATENT_CHANNELS), guidance_scale=scale
                )
                iou = field_iou(vae.field(latents), SolidBatch(solids), torch.Generator().manual_seed(1))
                print(
                    f"  step {step}, guidance {scale:g}: median IoU {iou.median():.4f}, mean {iou.mean():.4f}",
                    flush=True,
                )

        return look

    def assemble(self, run_dir: Path, backbone: Backbone, checkpoint: Path) -> None:
        """Write the layout of published checkpoints: all three networks in one file."""
        networks = {
            "model": backbone.transformer,
            "vae": _trained_vae(run_dir),
            "conditioner": _trained_conditioner(run_dir),
        }
        tensors = {name: tensor.half().contiguous() for name, tensor in nn.ModuleDict(networks).state_dict().items()}
        checkpoint.mkdir(parents=True, exist_ok=True)
        save_file(tensors, checkpoint / self.transformer_file)
        (checkpoint / "config.yaml").write_text(yaml.safe_dump(_config(), sort_keys=False))

    def write_samples(self, folder: Path) -> None:
        """Writes the built-in images, on which any mesh model can be calibrated."""
        self.built_in.mkdir(exist_ok=True)
        solids = sample_solids(range(_CALIBRATION, _CALIBRATION + _NUM_CALIBRATION), held_out=True)
        for number, solid in enumerate(solids):
            (self.built_in / f"{number:02d}.png").write_bytes(image_file(solid, _CALIBRATION + number))


def _train_conditioner(run_dir: Path, rank: int) -> None:
    train_conditioner(
        build_conditioner(),
        run_dir,
        num_solids=NUM_SOLIDS,
        num_steps=_CONDITIONER_STEPS,
        rank=rank,
        num_processes=stages.NUM_PROCESSES,
    )


def _trained_vae(run_dir: Path) -> ShapeVAE:
    vae = build_shape_vae().eval()
    vae.load_state_dict(torch.load(run_dir / "shape_vae.pt", weights_only=True))
    return vae


def _trained_conditioner(run_dir: Path) -> SingleImageEncoder:
    conditioner = build_conditioner().eval()
    conditioner.load_state_dict(torch.load(run_dir / "conditioner.pt", weights_only=True)["conditioner"])
    return conditioner


def _config() -> dict[str, Any]:
    shapegen = "hy3dshape"
    return {
        "model": {"target": f"{shapegen}.models.denoisers.hunyuandit.HunYuanDiTPlain", "params": HUNYUAN3D_PARAMS},
        "vae": {"target": f"{shapegen}.models.autoencoders.ShapeVAE", "params": {**VAE_PARAMS, "scale_factor": 1.0}},
        "conditioner": {"target": f"{shapegen}.models.conditioner.SingleImageEncoder", "params": CONDITIONER_PARAMS},
        "scheduler": {
            "target": f"{shapegen}.schedulers.FlowMatchEulerDiscreteScheduler",
            "params": {"num_train_timesteps": 1000},
        },
        "image_processor": {
            "target": f"{shapegen}.preprocessors.ImageProcessorV2",
            "params": {"size": SETTINGS.size, "border_ratio": SETTINGS.border_ratio},
        },
        "pipeline": {"target": f"{shapegen}.pipelines.Hunyuan3DDiTFlowMatchingPipeline"},
    }


if __name__ == "__main__":
    stages.main(TinyHunyuan3D())
