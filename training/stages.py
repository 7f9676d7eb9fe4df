"""The stages that train one tiny picture model from nothing; each resumes where it was interrupted.

Stages: vae, text, latents, base (two processes), assemble (writes checkpoints/<name>), routers (two processes, writes
router_weights/<name> but for calibration.json, which `elastic-dit calibrate` measures).
"""

import argparse
import json
import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from torch import nn
from torch.multiprocessing.spawn import spawn

from models.weights import save_router_weights, write_manifest
from training import base, routers, text
from training.backbones import Backbone
from training.prompts import calibration_scenes
from training.text import Conditioner
from training.vae import PictureVae, train_vae

NUM_PROCESSES = 2
STAGES = ("vae", "text", "latents", "base", "assemble", "routers")
_TRANSFORMER_FILE = "transformer/diffusion_pytorch_model.safetensors"


class Recipe(Protocol):
    """What differs between the tiny picture models.

    `defaults` are the model's in serving, `encoders` the folders of its text encoders.
    """

    name: str
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


def _paths(recipe: Recipe) -> tuple[Path, Path, Path]:
    """Folders of the run, the checkpoint and the router weights."""
    return Path("runs") / recipe.name, Path("checkpoints") / recipe.name, Path("router_weights") / recipe.name


def _trained_conditioner(recipe: Recipe) -> Conditioner:
    conditioner = recipe.conditioner()
    text.load_text(conditioner, _paths(recipe)[0])
    return conditioner


def _in_processes(train: Callable[[Recipe, int], None], recipe: Recipe) -> None:
    """Run `train(recipe, rank)` in two processes of one thread each, which do more than one process of two threads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_process, args=(port, train, recipe), nprocs=NUM_PROCESSES)


def _process(rank: int, port: int, train: Callable[[Recipe, int], None], recipe: Recipe) -> None:
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=NUM_PROCESSES)
    train(recipe, rank)
    dist.destroy_process_group()


def _train_base(recipe: Recipe, rank: int) -> None:
    run_dir, _, _ = _paths(recipe)
    base.train_base(
        run_dir,
        recipe.new_backbone(),
        recipe.new_backbone(),
        recipe.load_vae(run_dir / "vae"),
        _trained_conditioner(recipe),
        rank=rank,
        num_processes=NUM_PROCESSES,
        num_steps=recipe.base_steps,
    )


def _train_routers(recipe: Recipe, rank: int) -> None:
    run_dir, checkpoint, router_weights = _paths(recipe)
    weights = routers.train_routers(
        run_dir,
        recipe.load_backbone(checkpoint / "transformer"),
        _trained_conditioner(recipe),
        rank=rank,
        num_processes=NUM_PROCESSES,
        num_steps=routers.NUM_STEPS,
    )
    if rank == 0:
        save_router_weights(weights, router_weights)
        describe_routers(recipe, router_weights)


def describe_routers(recipe: Recipe, folder: Path) -> None:
    """Say where the routers come from and what they fit; beside it the prompts to calibrate them on."""
    _, checkpoint, _ = _paths(recipe)
    manifest = {
        "source": "trained from nothing by this repository on scenes that it draws",
        "license": "Apache-2.0",
        "base": str(checkpoint),
        "training_command": f"python -m training.{recipe.name.replace('-', '_')} --stage routers",
        "seed": routers.SEED,
        "num_steps": routers.NUM_STEPS,
        "defaults": dict(recipe.defaults),
    }
    write_manifest(folder, checkpoint, _TRANSFORMER_FILE, manifest)
    conditioner = recipe.conditioner()
    captions = [conditioner.caption(scene) for scene in calibration_scenes(32)]
    (folder / "calibration_prompts.txt").write_text("\n".join(captions) + "\n")


def assemble(recipe: Recipe) -> None:
    """Write an ordinary pipeline directory, all weights in 16 bits."""
    run_dir, target, _ = _paths(recipe)
    transformer: nn.Module = recipe.new_backbone().transformer
    transformer.load_state_dict(torch.load(run_dir / "base.pt", weights_only=True)["average"]["shadow"])
    pipeline = recipe.pipeline(recipe.load_vae(run_dir / "vae").module, _trained_conditioner(recipe), transformer)
    pipeline.to(dtype=torch.float16).save_pretrained(target)
    for encoder in recipe.encoders:
        # transformers loads in the type that the configuration names, diffusers in float32: agree on float32.
        path = target / encoder / "config.json"
        path.write_text(json.dumps(_in_float32(json.loads(path.read_text())), indent=2) + "\n")


def _in_float32(config: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _in_float32(value) for key, value in config.items() if isinstance(value, dict) and "dtype" in value}
    return config | inner | {"dtype": "float32"}


def run_stage(recipe: Recipe, stage: str) -> None:
    run_dir, _, _ = _paths(recipe)
    match stage:
        case "vae":
            vae = recipe.new_vae()
            train_vae(vae, run_dir)
            vae.module.save_pretrained(run_dir / "vae")
        case "text":
            text.train_text(recipe.conditioner(), run_dir, num_steps=recipe.text_steps)
        case "latents":
            base.encode_scenes(recipe.load_vae(run_dir / "vae"), base.NUM_SCENES, run_dir / "latents.pt")
        case "base":
            _in_processes(_train_base, recipe)
        case "assemble":
            assemble(recipe)
        case "routers":
            _in_processes(_train_routers, recipe)


def main(recipe: Recipe) -> None:
    """The command line of `python -m training.tiny_<family>`."""
    parser = argparse.ArgumentParser(description=f"Trains {recipe.name} from nothing.")
    parser.add_argument("--stage", choices=STAGES, help="only this one (default: all that are not done, in order)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    _paths(recipe)[0].mkdir(parents=True, exist_ok=True)
    for stage in [arguments.stage] if arguments.stage else STAGES:
        run_stage(recipe, stage)
