"""Trains tiny-flux from nothing: `python -m training.tiny_flux`. Every stage resumes where it was interrupted.

Stages: vae, text, latents, base (two processes), assemble (writes checkpoints/tiny-flux), routers (two processes,
writes router_weights/tiny-flux but for calibration.json, which `elastic-dit calibrate` measures).
"""

import argparse
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch.multiprocessing.spawn import spawn

from models.weights import save_router_weights, sha256
from training import base, routers, text, vae
from training.prompts import calibration_scenes
from training.text import TextConditioner

RUN_DIR = Path("runs/tiny-flux")
CHECKPOINT = Path("checkpoints/tiny-flux")
ROUTER_WEIGHTS = Path("router_weights/tiny-flux")
NUM_PROCESSES = 2
STAGES = ("vae", "text", "latents", "base", "assemble", "routers")
_TRANSFORMER_FILE = "transformer/diffusion_pytorch_model.safetensors"


def trained_conditioner(run_dir: Path) -> TextConditioner:
    conditioner = TextConditioner()
    saved = torch.load(run_dir / "text.pt", weights_only=True)
    for name, encoder in (("t5", conditioner.t5), ("clip", conditioner.clip)):
        encoder.load_state_dict(saved[name])
        encoder.eval().requires_grad_(False)
    return conditioner


def _in_processes(train: Callable[[int], None]) -> None:
    """Run `train(rank)` in two processes of one thread each, which together do more than one process of two threads."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_process, args=(port, train), nprocs=NUM_PROCESSES)


def _process(rank: int, port: int, train: Callable[[int], None]) -> None:
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=NUM_PROCESSES)
    train(rank)
    dist.destroy_process_group()


def _train_base(rank: int) -> None:
    base.train_base(
        RUN_DIR,
        AutoencoderKL.from_pretrained(RUN_DIR / "vae"),
        trained_conditioner(RUN_DIR),
        rank=rank,
        num_processes=NUM_PROCESSES,
        num_steps=base.NUM_STEPS,
    )


def _train_routers(rank: int) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(CHECKPOINT / "transformer", dtype=torch.float32)
    weights = routers.train_routers(
        RUN_DIR,
        transformer,
        trained_conditioner(RUN_DIR),
        rank=rank,
        num_processes=NUM_PROCESSES,
        num_steps=routers.NUM_STEPS,
    )
    if rank == 0:
        save_router_weights(weights, ROUTER_WEIGHTS)
        write_manifest(ROUTER_WEIGHTS)


def write_manifest(folder: Path) -> None:
    """Say where the routers come from and what they fit; beside it the prompts to calibrate them on."""
    manifest = {
        "source": "trained from nothing by this repository on scenes that it draws",
        "license": "Apache-2.0",
        "base": str(CHECKPOINT),
        "training_command": "python -m training.tiny_flux --stage routers",
        "seed": routers.SEED,
        "num_steps": routers.NUM_STEPS,
        "defaults": {"num_inference_steps": 20, "guidance_scale": 3.0},
        "sha256": {
            "router.safetensors": sha256(folder / "router.safetensors"),
            _TRANSFORMER_FILE: sha256(CHECKPOINT / _TRANSFORMER_FILE),
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    captions = [scene.caption for scene in calibration_scenes(32)]
    (folder / "calibration_prompts.txt").write_text("\n".join(captions) + "\n")


def assemble(run_dir: Path, target: Path) -> None:
    """Write an ordinary FLUX pipeline directory, all weights in 16 bits."""
    transformer = base.build_transformer()
    transformer.load_state_dict(torch.load(run_dir / "base.pt", weights_only=True)["average"]["shadow"])
    conditioner = trained_conditioner(run_dir)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL.from_pretrained(run_dir / "vae"),
        text_encoder=conditioner.clip,
        tokenizer=conditioner.clip_tokenizer,
        text_encoder_2=conditioner.t5,
        tokenizer_2=conditioner.t5_tokenizer,
        transformer=transformer,
    )
    pipeline.to(torch.float16).save_pretrained(target)
    for encoder in ("text_encoder", "text_encoder_2"):
        # transformers loads in the type that the configuration names, diffusers in float32: agree on float32.
        path = target / encoder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def run_stage(stage: str) -> None:
    match stage:
        case "vae":
            vae.train_vae(RUN_DIR).save_pretrained(RUN_DIR / "vae")
        case "text":
            text.train_text(RUN_DIR)
        case "latents":
            base.encode_scenes(AutoencoderKL.from_pretrained(RUN_DIR / "vae"), base.NUM_SCENES, RUN_DIR / "latents.pt")
        case "base":
            _in_processes(_train_base)
        case "assemble":
            assemble(RUN_DIR, CHECKPOINT)
        case "routers":
            _in_processes(_train_routers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=STAGES, help="only this one (default: all that are not done, in order)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    RUN_DIR.mkdir(parents=True, exist_ok=True)
    for stage in [arguments.stage] if arguments.stage else STAGES:
        run_stage(stage)


if __name__ == "__main__":
    main()
