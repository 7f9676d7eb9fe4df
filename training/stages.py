"""The stages that train one tiny model from scratch. Each stage resumes where it was interrupted.

1. The preparations of the model's recipe; the last one encodes the samples of its lesson.
2. `base` trains the transformer in two processes.
3. `assemble` writes checkpoints/<name>.
4. `order` sorts the hidden neurons in it by importance.
5. `routers` trains the routers in two processes and writes router_weights/<name>.

`elastic-dit calibrate` then measures the routers and writes their calibration.json.
"""

import argparse
import logging
import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from models.weights import save_router_weights, write_manifest
from training import base, routers
from training.attention import use_matrix_products
from training.backbone import Backbone
from training.lesson import Lesson
from training.published import PublishedObjective
from training.routers import RouterObjective

NUM_PROCESSES = 2


class Recipe(Protocol):
    """The differences between the tiny models.

    `module` is the program that trains the model. `defaults` are the settings it is served with. `transformer_file` is
    the file of a checkpoint that holds the transformer. `preparations` are the stages before the transformer's; each
    gets the folder of the run.
    """

    name: str
    module: str
    base_steps: int
    router_steps: int
    defaults: Mapping[str, float]
    transformer_file: str

    @property
    def preparations(self) -> Mapping[str, Callable[[Path], None]]: ...

    def new_backbone(self) -> Backbone: ...
    def load_backbone(self, checkpoint: Path) -> Backbone: ...
    def lesson(self, run_dir: Path, backbone: Backbone, checkpoint: Path | None) -> Lesson:
        """The lesson of the routers if there is a `checkpoint`, else of the transformer."""
        ...

    def look(self, run_dir: Path, backbone: Backbone, lesson: Lesson) -> Callable[[int, float], None]:
        """A function of the step and the share of the run that is done, which samples from `backbone`."""
        ...

    def assemble(self, run_dir: Path, backbone: Backbone, checkpoint: Path) -> None:
        """Write the model directory `checkpoint`, all weights in 16 bits."""
        ...

    def write_samples(self, folder: Path) -> None:
        """Write the prompts or images that the routers are calibrated on."""
        ...


def paths(recipe: Recipe) -> tuple[Path, Path, Path]:
    """The folders of the run, the checkpoint and the router weights."""
    return Path("runs") / recipe.name, Path("checkpoints") / recipe.name, Path("router_weights") / recipe.name


def in_processes(train: Callable[[Any, int], None], recipe: Any) -> None:
    """Run `train(recipe, rank)` in two processes of one thread each. One process of two threads would be slower."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_process, args=(port, train, recipe), nprocs=NUM_PROCESSES)


def _process(rank: int, port: int, train: Callable[[Any, int], None], recipe: Any) -> None:
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    use_matrix_products()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=NUM_PROCESSES)
    train(recipe, rank)
    dist.destroy_process_group()


def _train_base(recipe: Recipe, rank: int) -> None:
    run_dir, _, _ = paths(recipe)
    backbone, average = recipe.new_backbone(), recipe.new_backbone()
    lesson = recipe.lesson(run_dir, backbone, None)
    base.train_base(
        run_dir,
        backbone,
        average,
        lesson,
        recipe.look(run_dir, average, lesson),
        rank=rank,
        num_processes=NUM_PROCESSES,
        num_steps=recipe.base_steps,
    )


def _train_routers(recipe: Recipe, rank: int) -> None:
    run_dir, _, folder = paths(recipe)
    _train_routers_in(run_dir, folder, RouterObjective, f"python -m {recipe.module} --stage routers", recipe, rank)


def _train_published_routers(recipe: Recipe, rank: int) -> None:
    """Train routers to compare with, beside those that are served."""
    run_dir, folder = paths(recipe)[0] / "paper", Path("runs/paper") / recipe.name
    command = f"python -m {recipe.module} --stage routers --recipe paper"
    _train_routers_in(run_dir, folder, PublishedObjective, command, recipe, rank)


def _train_routers_in(
    run_dir: Path, folder: Path, new_objective: type[RouterObjective], command: str, recipe: Recipe, rank: int
) -> None:
    lessons, checkpoint, _ = paths(recipe)
    backbone = recipe.load_backbone(checkpoint)
    weights = routers.train_routers(
        run_dir,
        backbone,
        recipe.lesson(lessons, backbone, checkpoint),
        new_objective,
        rank=rank,
        num_processes=NUM_PROCESSES,
        num_steps=recipe.router_steps,
    )
    if rank == 0:
        save_router_weights(weights, folder)
        describe_routers(recipe, folder, command)


def describe_routers(recipe: Recipe, folder: Path, command: str) -> None:
    """Write the manifest of the routers in `folder`, and the samples to calibrate them on."""
    _, checkpoint, _ = paths(recipe)
    manifest = {
        "source": "trained from nothing by this repository on samples that it draws",
        "license": "Apache-2.0",
        "base": str(checkpoint),
        "training_command": command,
        "seed": routers.SEED,
        "num_steps": recipe.router_steps,
        "defaults": dict(recipe.defaults),
    }
    write_manifest(folder, checkpoint, recipe.transformer_file, manifest)
    recipe.write_samples(folder)


def _assemble(recipe: Recipe) -> None:
    run_dir, checkpoint, _ = paths(recipe)
    backbone = recipe.new_backbone()
    trained = torch.load(run_dir / "base.pt", weights_only=True)["average"]["shadow"]
    backbone.transformer.load_state_dict(trained)
    recipe.assemble(run_dir, backbone, checkpoint)


def _order(recipe: Recipe) -> None:
    run_dir, checkpoint, _ = paths(recipe)
    backbone = recipe.load_backbone(checkpoint)
    lesson = recipe.lesson(run_dir, backbone, checkpoint)
    routers.order_neurons(backbone, lesson, checkpoint / recipe.transformer_file)


def _stages(recipe: Recipe) -> dict[str, Callable[[], object]]:
    run_dir, _, _ = paths(recipe)
    return {
        **{name: partial(prepare, run_dir) for name, prepare in recipe.preparations.items()},
        "base": partial(in_processes, _train_base, recipe),
        "assemble": partial(_assemble, recipe),
        "order": partial(_order, recipe),
        "routers": partial(in_processes, _train_routers, recipe),
    }


def main(recipe: Recipe) -> None:
    """The command line of `python -m <recipe.module>`."""
    parser = argparse.ArgumentParser(description=f"Train {recipe.name} from scratch.")
    parser.add_argument(
        "--stage", choices=_stages(recipe), help="run this stage only (default: all unfinished stages, in order)"
    )
    parser.add_argument(
        "--recipe",
        choices=("range", "paper"),
        default="range",
        help="what routers learn: any budget (default), or the published objective, for comparison: into runs/paper",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    paths(recipe)[0].mkdir(parents=True, exist_ok=True)
    stages = _stages(recipe)
    if arguments.recipe == "paper":
        stages["routers"] = partial(in_processes, _train_published_routers, recipe)
    for stage in [arguments.stage] if arguments.stage else stages:
        stages[stage]()
