"""What do weights in fewer bits cost in quality and memory?

`python -m benchmarks.float8` makes the same images or meshes with every storage of weights and two budgets, at the same
seeds, and compares each with that of float32 at the same budget: by `Engine.similarity` (SSIM, or IoU of volumes) and,
for images, by PSNR. `latents` is the largest difference of a number in the latents. It counts the bytes of the
transformer.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from skimage.metrics import peak_signal_noise_ratio
from tqdm import tqdm

from benchmarks import engine as images
from benchmarks import meshes
from benchmarks.environment import environment
from benchmarks.table import TableRow, finish, show
from models.card import ImageCard
from models.curve import Preset
from models.engine import Engine
from models.load_options import LoadOptions, Weights
from models.request import Budget, GenerationRequest, PresetBudget, QualityBudget
from models.state import DenoiseState
from models.zoo import load_engine
from training.scenes.prompts import complex_scenes

_BATCH_SIZE = 8
BUDGETS: Mapping[str, Budget] = {"exact": PresetBudget(Preset.EXACT), "quality .9": QualityBudget(0.9)}


class Storage(NamedTuple):
    """A storage of weights and the type that models compute in."""

    weights: Weights
    device: str
    computes_in: str


STORAGES = (
    Storage(Weights.FLOAT32, "cpu", "float32"),
    Storage(Weights.FLOAT8, "cpu", "float32"),
    Storage(Weights.BFLOAT16, "cpu", "bfloat16"),
    Storage(Weights.FLOAT8, "cpu:0", "bfloat16"),
)


def requests_for(engine: Engine, model: str, budget: Budget, count: int) -> Sequence[GenerationRequest]:
    if isinstance(engine.cards[model], ImageCard):
        return images.requests_for(engine, model, complex_scenes(count), budget)
    return meshes.requests_for(engine, model, meshes.held_out_solids(count), budget)


def states_of(engine: Engine, requests: Sequence[GenerationRequest]) -> list[DenoiseState]:
    states = [engine.start(request) for request in requests]
    for state in states:
        state.exact_tolerance = None  # so that they share their calls
    for first in tqdm(range(0, len(states), _BATCH_SIZE)):
        batch = states[first : first + _BATCH_SIZE]
        while running := [state for state in batch if not state.is_done]:
            engine.step(running)
    return states


def measure(directory: Path, router_weights: Path, count: int) -> list[TableRow]:
    model, rows = directory.name, []
    full: dict[str, tuple[list[DenoiseState], list[NDArray[Any]]]] = {}
    for storage in STORAGES:
        options = LoadOptions(weights=storage.weights)
        engine = load_engine([directory], device=storage.device, router_weights=router_weights, options=options)
        size = sum(parameter.nbytes for parameter in engine._families[model].transformer.parameters())
        for name, budget in BUDGETS.items():
            states = states_of(engine, requests_for(engine, model, budget, count))
            samples = [engine.quality_sample(state) for state in states]
            full_states, full_samples = full.setdefault(name, (states, samples))
            pairs = list(zip(samples, full_samples, strict=True))
            alike = [engine.similarity(model, *pair) for pair in pairs]
            row: TableRow = {"model": model, "weights": storage.weights, "computes in": storage.computes_in}
            row |= {"MiB": size / 2**20, "budget": name, "mean": statistics.mean(alike), "lowest": min(alike)}
            row["latents"] = max(
                float((ours.latents.float() - theirs.latents.float()).abs().max())
                for ours, theirs in zip(states, full_states, strict=True)
            )
            is_image = isinstance(engine.cards[model], ImageCard) and storage.weights is not Weights.FLOAT32
            row["PSNR"] = (
                statistics.mean(float(peak_signal_noise_ratio(theirs, ours)) for ours, theirs in pairs)
                if is_image
                else None
            )
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--router-weights", type=Path, default=Path("router_weights"))
    parser.add_argument("--models", nargs="+", default=["tiny-flux", "tiny-qwen-image", "tiny-hunyuan3d"])
    parser.add_argument("--count", type=int, default=16, help="images or meshes of each setting")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    rows = [
        row
        for model in arguments.models
        for row in measure(arguments.checkpoints / model, arguments.router_weights, arguments.count)
    ]
    show("Similarity to float32 at the same budget and seed", rows)
    finish({"benchmark": "float8", "environment": environment(), "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
