"""How much time does elasticity save for meshes, and what does it cost in quality?

`python -m benchmarks.meshes` generates meshes from images of held-out solids. Two measurements in one run:

time     a plain loop over the unwrapped denoiser, our loop at `exact`, every preset, and compute caps take turns in
         every round, on the same image and noise; a ratio compares within a round, and its median over rounds is
         reported
quality  volume IoU and F-score of the meshes against the true solid, and against the exact mesh of the same seed:
         medians, with 0 for a shape without a surface; seconds from latents to a clean mesh. The solids are of
         combinations that training holds out. At `exact` and under caps, new solids of the training combinations are
         measured too

The plain loop samples as published, with both guidance rows in one batch. Steps of no length are left out, as in our
loop.
"""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from benchmarks.contenders import Contender, Denoising, contenders, decisions, elastic_denoise, time_in_turn
from benchmarks.environment import environment
from benchmarks.mesh_sheet import Cell, draw_sheet
from benchmarks.table import TableRow, finish, show
from models.budget import resolve
from models.card import MeshCard
from models.curve import Preset
from models.diffusion.sampling import classifier_free_guidance, euler_step
from models.engine import Engine
from models.errors import EmptySurface
from models.families.hunyuan3d.checkpoint import Hunyuan3DCheckpoint, load_checkpoint
from models.families.hunyuan3d.conditioner import image_tensor
from models.families.hunyuan3d.preparation import prepare_pixels
from models.mesh.cleanup import CleanMesh
from models.mesh.surface import Mesh
from models.report import GenerationSummary
from models.request import Budget, ComputeBudget, MeshRequest, PresetBudget
from models.zoo import load_engine
from training.solids.images import image_file
from training.solids.judge import Shape, surface_likeness, volume_iou
from training.solids.sampling import sample_solids
from training.solids.solids import Solid

_BATCH_SIZE = 8
_FIRST_SOLID = 4 * 10**9
"""Far from the solids of training, calibration and other measurements."""


@dataclass(frozen=True, slots=True)
class MeshResult:
    """The result of a request. `mesh` is None if its field had no surface."""

    mesh: Mesh | None
    decode_seconds: float
    summary: GenerationSummary


@dataclass(frozen=True, slots=True)
class Similarity:
    """Volume IoU, F-score and chamfer distance of two shapes; the distance is None if one of them is missing."""

    iou: float
    f_score: float
    chamfer: float | None


@dataclass(frozen=True, slots=True)
class Judged:
    """The results of one contender, and their similarity to the true solids."""

    results: Sequence[MeshResult]
    to_truth: Sequence[Similarity]


def held_out_solids(count: int) -> list[Solid]:
    return sample_solids(range(_FIRST_SOLID, _FIRST_SOLID + count), held_out=True)


def solids_of_taught_combinations(count: int) -> list[Solid]:
    """New solids, drawn like those of training."""
    return sample_solids(range(_FIRST_SOLID, _FIRST_SOLID + count))


def requests_for(
    engine: Engine, model: str, solids: Sequence[Solid], budget: Budget, octree_resolution: int | None = None
) -> list[MeshRequest]:
    card = engine.cards[model]
    assert isinstance(card, MeshCard)
    return [
        MeshRequest(
            model=model,
            num_inference_steps=card.default_num_inference_steps,
            guidance_scale=card.default_guidance_scale,
            seed=seed,
            budget=budget,
            point=resolve(budget, card.curve),
            is_guided=card.is_guided(card.default_guidance_scale),
            input_image=image_file(solid, seed),
            octree_resolution=octree_resolution or card.default_octree_resolution,
        )
        for seed, solid in enumerate(solids)
    ]


@torch.inference_mode()
def stock_inputs(checkpoint: Hunyuan3DCheckpoint, requests: Sequence[MeshRequest]) -> tuple[Tensor, Tensor]:
    """Noise `(batch, tokens, channels)` and encoded images `(batch, image tokens, channels)`."""
    vae = checkpoint.vae
    contexts, noise = [], []
    for each in requests:
        with Image.open(BytesIO(each.input_image)) as file:
            pixels = prepare_pixels(file, checkpoint.image_settings, each.remove_background)
        contexts.append(checkpoint.conditioner(image_tensor(pixels)))
        rng = torch.Generator().manual_seed(each.seed)
        noise.append(torch.randn(1, vae.num_latents, vae.embed_dim, generator=rng))
    return torch.cat(noise), torch.cat(contexts)


@torch.inference_mode()
def stock_denoise(checkpoint: Hunyuan3DCheckpoint, requests: Sequence[MeshRequest]) -> tuple[Tensor, Denoising]:
    """The published loop on the plain denoiser: latents `(batch, tokens, channels)`, timed from encoded images on."""
    request = requests[0]
    latents, context = stock_inputs(checkpoint, requests)
    sigmas = checkpoint.schedule(request.num_inference_steps)
    started = time.perf_counter()
    for sigma, next_sigma in pairwise(sigmas):
        if next_sigma > sigma:
            predicted = velocity(checkpoint, latents, sigma, context, request.guidance_scale)
            latents = euler_step(latents, predicted, sigma, next_sigma)
    return latents, Denoising(time.perf_counter() - started)


def velocity(
    checkpoint: Hunyuan3DCheckpoint, latents: Tensor, sigma: Tensor, context: Tensor, guidance_scale: float
) -> Tensor:
    """The plain denoiser's guided velocity of all latents."""
    denoiser, count = checkpoint.denoiser, len(latents)
    if checkpoint.has_guidance_embedding:
        guided: Tensor = denoiser(latents, sigma.expand(count), context, torch.full((count,), guidance_scale))
        return guided
    rows = torch.cat((context, torch.zeros_like(context)))
    cond, uncond = denoiser(latents.repeat(2, 1, 1), sigma.expand(2 * count), rows).chunk(2)
    return classifier_free_guidance(cond, uncond, guidance_scale)


def measure_time(
    engine: Engine,
    checkpoint: Hunyuan3DCheckpoint,
    names: Sequence[Contender],
    model: str,
    batch_size: int,
    num_rounds: int,
) -> list[TableRow]:
    """The rows of `time_in_turn`, with a column for the batch size."""
    solids = held_out_solids(batch_size * (num_rounds + 1))

    def denoise(contender: Contender, number: int) -> Denoising:
        chosen = solids[number * batch_size : (number + 1) * batch_size]
        requests = requests_for(engine, model, chosen, contender.budget or PresetBudget(Preset.EXACT))
        return elastic_denoise(engine, requests) if contender.budget else stock_denoise(checkpoint, requests)[1]

    rows = time_in_turn(names, num_rounds, f"time, batch {batch_size}", denoise)
    return [{"name": row.pop("name"), "batch_size": batch_size, **row} for row in rows]


def generate(engine: Engine, requests: Sequence[MeshRequest], title: str) -> list[MeshResult]:
    results = []
    for first in tqdm(range(0, len(requests), _BATCH_SIZE), desc=title):
        states = [engine.start(request) for request in requests[first : first + _BATCH_SIZE]]
        while not states[0].is_done:
            engine.step(states)
        for state in states:
            started = time.perf_counter()
            try:
                cleaned = engine.finish(state)
            except EmptySurface:
                mesh = None
            else:
                assert isinstance(cleaned, CleanMesh)
                mesh = cleaned.mesh
            results.append(MeshResult(mesh, time.perf_counter() - started, state.summary()))
    return results


def compare(mesh: Mesh | None, shape: Shape | None) -> Similarity:
    if mesh is None or shape is None:
        return Similarity(0.0, 0.0, None)
    surface = surface_likeness(mesh, shape)
    return Similarity(volume_iou(mesh, shape), surface.f_score, surface.chamfer)


def judge(engine: Engine, requests: Sequence[MeshRequest], solids: Sequence[Solid], title: str) -> Judged:
    """Generate the meshes of the requests and compare them with the solids that their images show."""
    results = generate(engine, requests, title)
    return Judged(results, [compare(result.mesh, solid) for result, solid in zip(results, solids, strict=True)])


def truth_row(name: str, judged: Judged) -> TableRow:
    """Medians over the solids of the similarity to the truth, and the contender's decisions."""
    chamfers = [similarity.chamfer for similarity in judged.to_truth if similarity.chamfer is not None]
    return {
        "name": name,
        "iou_true": statistics.median(similarity.iou for similarity in judged.to_truth),
        "f_true": statistics.median(similarity.f_score for similarity in judged.to_truth),
        "chamfer_true": statistics.median(chamfers) if chamfers else None,
        "empty": sum(result.mesh is None for result in judged.results),
        "decode_s": statistics.median(result.decode_seconds for result in judged.results),
        **decisions([result.summary for result in judged.results]),
    }


def quality_row(name: str, judged: Judged, exact: Sequence[MeshResult]) -> TableRow:
    """`truth_row`, and medians of the similarity to the exact meshes of the same seeds."""
    to_exact = [compare(own.mesh, other.mesh) for own, other in zip(judged.results, exact, strict=True)]
    return {
        **truth_row(name, judged),
        "iou_exact": statistics.median(similarity.iou for similarity in to_exact),
        "f_exact": statistics.median(similarity.f_score for similarity in to_exact),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/tiny-hunyuan3d"))
    parser.add_argument("--router-weights", type=Path, default=Path("router_weights"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--solids", type=int, default=48, help="number of solids for the quality")
    parser.add_argument("--octree-resolution", type=int, help="the model's default if not given")
    parser.add_argument("--caps", type=float, nargs="*", default=[0.5], help="compute_ratio budgets beside the presets")
    parser.add_argument("--only", choices=("time", "quality"))
    parser.add_argument("--sheet", type=Path, help="draw the first solids' meshes at every budget into this file")
    parser.add_argument("--sheet-rows", type=int, default=6)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def measure_times(
    engine: Engine, names: Sequence[Contender], model: str, arguments: argparse.Namespace
) -> list[TableRow]:
    """The rows of all batch sizes."""
    checkpoint = load_checkpoint(arguments.model, "cpu", torch.float32)
    return [
        row
        for batch_size in arguments.batches
        for row in measure_time(engine, checkpoint, names, model, batch_size, arguments.rounds)
    ]


def measure_quality(
    engine: Engine,
    names: Sequence[Contender],
    model: str,
    solids: Sequence[Solid],
    octree_resolution: int | None,
    title: str,
) -> dict[str, Judged]:
    """The meshes of every elastic contender, by its name, and their similarity to the true solids."""
    judged = {}
    for contender in names:
        if contender.budget is not None:
            requests = requests_for(engine, model, solids, contender.budget, octree_resolution)
            judged[contender.name] = judge(engine, requests, solids, contender.name + title)
    return judged


def draw(path: Path, solids: Sequence[Solid], judged: Mapping[str, Judged], time_ratios: Mapping[str, float]) -> None:
    """Write the sheet of these first solids and their meshes."""
    columns = {
        _heading(name, time_ratios): [
            Cell(result.mesh, f"compute {result.summary.compute_ratio:.0%}\nIoU {similarity.iou:.3f}")
            for result, similarity in zip(own.results, own.to_truth, strict=True)
        ][: len(solids)]
        for name, own in judged.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.open(BytesIO(image_file(solid, seed))) for seed, solid in enumerate(solids)]
    draw_sheet(solids, images, columns).save(path)


def _heading(name: str, time_ratios: Mapping[str, float]) -> str:
    return f"{name}\n{time_ratios[name]:.2f} of the time" if name in time_ratios else name


def main() -> None:
    arguments = parse_arguments()
    engine = load_engine([arguments.model], device="cpu", router_weights=arguments.router_weights)
    model = arguments.model.name
    names = contenders(engine, model, arguments.caps)
    result: dict[str, object] = {"benchmark": "meshes", "model": model, "environment": environment()}
    time_ratios: dict[str, float] = {}
    if arguments.only in (None, "time"):
        rows = measure_times(engine, names, model, arguments)
        result["time"] = rows
        show("Denoise time over the plain loop's", rows)
        of_first_batch_size = rows[: len(names)]
        time_ratios = {str(row["name"]): float(row["time_ratio"] or 0) for row in of_first_batch_size}
    if arguments.only in (None, "quality"):
        solids, resolution = held_out_solids(arguments.solids), arguments.octree_resolution
        judged = measure_quality(engine, names, model, solids, resolution, "")
        exact = next(iter(judged.values())).results
        rows = [quality_row(name, own, exact) for name, own in judged.items()]
        result |= {"quality": rows, "solids": arguments.solids}
        show("Quality", rows)
        dense_and_capped = [
            c for c in names if c.budget == PresetBudget(Preset.EXACT) or isinstance(c.budget, ComputeBudget)
        ]
        taught = solids_of_taught_combinations(arguments.solids)
        judged_taught = measure_quality(
            engine, dense_and_capped, model, taught, resolution, ", combinations of training"
        )
        rows = [truth_row(name, own) for name, own in judged_taught.items()]
        result["quality_of_taught_combinations"] = rows
        show("Quality, new solids of the combinations of training", rows)
        if arguments.sheet:
            draw(arguments.sheet, solids[: arguments.sheet_rows], judged, time_ratios)
    finish(result, arguments.json)


if __name__ == "__main__":
    main()
