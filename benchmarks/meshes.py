"""How much time does elasticity save for meshes, and what does it cost in quality?

`python -m benchmarks.meshes` gives a model images of held-out solids. Two measurements in one run:

time     a plain loop over the unwrapped denoiser, our loop at `exact`, every preset and compute caps, interleaved round
         by round on the same images and noise; a ratio is a round's own, and its median over rounds is reported
quality  volume IoU and F-score of the meshes against the true solid and against the exact mesh of the same seed, as
         medians, with 0 for a shape without surface; seconds from latents to a clean mesh. The solids are of held-out
         combinations; at `exact` and under caps, new solids of the training combinations are measured too

The plain loop samples as published, with both guidance rows in one batch. Like ours, it leaves out steps of no length.
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
from benchmarks.table import Row, finish, show
from models.card import MeshCard
from models.diffusion.sampling import classifier_free_guidance, euler_step
from models.engine import Engine
from models.errors import EmptySurface
from models.families.hunyuan3d.checkpoint import Hunyuan3DCheckpoint, load_checkpoint
from models.families.hunyuan3d.preparation import prepare_picture
from models.mesh.cleanup import CleanMesh
from models.mesh.surface import Mesh
from models.report import GenerationSummary
from models.request import Budget, ComputeBudget, MeshRequest, Preset, PresetBudget
from models.zoo import load_engine
from training.solids.images import image_file
from training.solids.judge import Shape, surface_likeness, volume_iou
from training.solids.sampling import sample_solids
from training.solids.solids import Solid

_BATCH_SIZE = 8
_FIRST_SOLID = 4 * 10**9
"""Far from the seeds of training, calibration and other measurements."""


@dataclass(frozen=True, slots=True)
class GeneratedMesh:
    """The result of a request; `mesh` is None if the field had no surface."""

    mesh: Mesh | None
    decode_seconds: float
    summary: GenerationSummary


@dataclass(frozen=True, slots=True)
class Likeness:
    """Likeness to another shape; `chamfer` is None if one of the two is empty."""

    iou: float
    f_score: float
    chamfer: float | None


@dataclass(frozen=True, slots=True)
class JudgedMeshes:
    """One contender's meshes, and the likeness of each to its true solid."""

    name: str
    meshes: Sequence[GeneratedMesh]
    true: Sequence[Likeness]


def held_out_solids(count: int) -> list[Solid]:
    return sample_solids(range(_FIRST_SOLID, _FIRST_SOLID + count), held_out=True)


def solids_of_training_combinations(count: int) -> list[Solid]:
    """New solids of the combinations that training uses."""
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
            input_image=image_file(solid, seed),
            octree_resolution=octree_resolution or card.default_octree_resolution,
        )
        for seed, solid in enumerate(solids)
    ]


@torch.inference_mode()
def stock_denoise(checkpoint: Hunyuan3DCheckpoint, requests: Sequence[MeshRequest]) -> tuple[Tensor, Denoising]:
    """The published loop on the plain denoiser: latents `(batch, tokens, channels)`, timed from the encoded images."""
    request, vae = requests[0], checkpoint.vae
    contexts, noise = [], []
    for each in requests:
        with Image.open(BytesIO(each.input_image)) as file:
            contexts.append(checkpoint.conditioner(prepare_picture(file, checkpoint.picture, each.remove_background)))
        rng = torch.Generator().manual_seed(each.seed)
        noise.append(torch.randn(1, vae.num_latents, vae.embed_dim, generator=rng))
    context, latents = torch.cat(contexts), torch.cat(noise)
    sigmas = checkpoint.schedule(request.num_inference_steps)
    started = time.perf_counter()
    for sigma, next_sigma in pairwise(sigmas):
        if next_sigma > sigma:
            velocity = _velocity(checkpoint, latents, sigma, context, request.guidance_scale)
            latents = euler_step(latents, velocity, sigma, next_sigma)
    return latents, Denoising(time.perf_counter() - started)


def _velocity(
    checkpoint: Hunyuan3DCheckpoint, latents: Tensor, sigma: Tensor, context: Tensor, guidance_scale: float
) -> Tensor:
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
) -> list[Row]:
    """The rows of `time_in_turn`, with batch size."""
    solids = held_out_solids(batch_size * (num_rounds + 1))

    def denoise(contender: Contender, number: int) -> Denoising:
        chosen = solids[number * batch_size : (number + 1) * batch_size]
        requests = requests_for(engine, model, chosen, contender.budget or PresetBudget(Preset.EXACT))
        return elastic_denoise(engine, requests) if contender.budget else stock_denoise(checkpoint, requests)[1]

    rows = time_in_turn(names, num_rounds, f"time, batch {batch_size}", denoise)
    return [{"name": row.pop("name"), "batch_size": batch_size, **row} for row in rows]


def generate(engine: Engine, requests: Sequence[MeshRequest], title: str) -> list[GeneratedMesh]:
    generated = []
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
            generated.append(GeneratedMesh(mesh, time.perf_counter() - started, state.summary()))
    return generated


def compare(mesh: Mesh | None, shape: Shape | None) -> Likeness:
    if mesh is None or shape is None:
        return Likeness(0.0, 0.0, None)
    likeness = surface_likeness(mesh, shape)
    return Likeness(volume_iou(mesh, shape), likeness.f_score, likeness.chamfer)


def generate_and_judge(
    engine: Engine, requests: Sequence[MeshRequest], solids: Sequence[Solid], name: str
) -> JudgedMeshes:
    generated = generate(engine, requests, name)
    return JudgedMeshes(
        name, generated, [compare(one.mesh, solid) for one, solid in zip(generated, solids, strict=True)]
    )


def truth_row(judged: JudgedMeshes) -> Row:
    chamfers = [likeness.chamfer for likeness in judged.true if likeness.chamfer is not None]
    return {
        "name": judged.name,
        "iou_true": statistics.median(likeness.iou for likeness in judged.true),
        "f_true": statistics.median(likeness.f_score for likeness in judged.true),
        "chamfer_true": statistics.median(chamfers) if chamfers else None,
        "empty": sum(one.mesh is None for one in judged.meshes),
        "decode_s": statistics.median(one.decode_seconds for one in judged.meshes),
        **decisions([one.summary for one in judged.meshes]),
    }


def quality_row(judged: JudgedMeshes, exact: Sequence[Likeness]) -> Row:
    return {
        **truth_row(judged),
        "iou_exact": statistics.median(likeness.iou for likeness in exact),
        "f_exact": statistics.median(likeness.f_score for likeness in exact),
    }


def measure_quality(
    engine: Engine, names: Sequence[Contender], model: str, solids: Sequence[Solid], octree_resolution: int | None
) -> tuple[list[Row], list[JudgedMeshes]]:
    """Rows of quality against the true solids and against `exact`, and the meshes themselves."""
    rows: list[Row] = []
    columns: list[JudgedMeshes] = []
    for contender in names:
        if contender.budget:
            requests = requests_for(engine, model, solids, contender.budget, octree_resolution)
            judged = generate_and_judge(engine, requests, solids, contender.name)
            columns.append(judged)
            exact = columns[0].meshes
            own = [compare(one.mesh, other.mesh) for one, other in zip(judged.meshes, exact, strict=True)]
            rows.append(quality_row(judged, own))
    return rows, columns


def measure_quality_of_training_combinations(
    engine: Engine, names: Sequence[Contender], model: str, solids: Sequence[Solid], octree_resolution: int | None
) -> list[Row]:
    """Rows of quality against the true solids, at `exact` and under the compute caps."""
    return [
        truth_row(
            generate_and_judge(
                engine,
                requests_for(engine, model, solids, contender.budget, octree_resolution),
                solids,
                contender.name,
            )
        )
        for contender in names
        if contender.budget == PresetBudget(Preset.EXACT) or isinstance(contender.budget, ComputeBudget)
    ]


def write_sheet(
    path: Path, solids: Sequence[Solid], columns: Sequence[JudgedMeshes], time_ratios: Mapping[str, float]
) -> None:
    """Draw the meshes of these solids at every budget."""
    cells = {
        _heading(judged.name, time_ratios): [
            Cell(one.mesh, f"compute {one.summary.compute_ratio:.0%}\nIoU {likeness.iou:.3f}")
            for one, likeness in zip(judged.meshes, judged.true, strict=True)
        ][: len(solids)]
        for judged in columns
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [Image.open(BytesIO(image_file(solid, seed))) for seed, solid in enumerate(solids)]
    draw_sheet(solids, images, cells).save(path)


def _heading(name: str, time_ratios: Mapping[str, float]) -> str:
    return f"{name}\n{time_ratios[name]:.2f} of the time" if name in time_ratios else name


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/tiny-hunyuan3d"))
    parser.add_argument("--router-weights", type=Path, default=Path("router_weights"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--solids", type=int, default=48, help="solids to measure quality on")
    parser.add_argument("--octree-resolution", type=int, help="default: the model's")
    parser.add_argument("--caps", type=float, nargs="*", default=[0.5], help="compute_ratio budgets beside the presets")
    parser.add_argument("--only", choices=("time", "quality"))
    parser.add_argument("--sheet", type=Path, help="write a sheet of the first solids' meshes at every budget")
    parser.add_argument("--sheet-rows", type=int, default=6)
    parser.add_argument("--json", type=Path, help="also write the result here")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    engine = load_engine([arguments.model], device="cpu", router_weights=arguments.router_weights)
    model = arguments.model.name
    names = contenders(engine, model, arguments.caps)
    result: dict[str, object] = {"benchmark": "meshes", "model": model, "environment": environment()}
    time_ratios: dict[str, float] = {}
    if arguments.only in (None, "time"):
        checkpoint = load_checkpoint(arguments.model, "cpu", torch.float32)
        rows = [
            row
            for batch_size in arguments.batches
            for row in measure_time(engine, checkpoint, names, model, batch_size, arguments.rounds)
        ]
        result["time"] = rows
        show("Denoise time over the plain loop's", rows)
        of_smallest_batch = rows[: len(names)]
        time_ratios = {str(row["name"]): float(row["time_ratio"] or 0) for row in of_smallest_batch}
    if arguments.only in (None, "quality"):
        solids, resolution = held_out_solids(arguments.solids), arguments.octree_resolution
        rows, columns = measure_quality(engine, names, model, solids, resolution)
        result["quality"] = rows
        result["solids"] = arguments.solids
        show("Quality", rows)
        taught = solids_of_training_combinations(arguments.solids)
        rows = measure_quality_of_training_combinations(engine, names, model, taught, resolution)
        result["quality_of_taught_combinations"] = rows
        show("Quality, new solids of the combinations of training", rows)
        if arguments.sheet:
            write_sheet(arguments.sheet, solids[: arguments.sheet_rows], columns, time_ratios)
    finish(result, arguments.json)


if __name__ == "__main__":
    main()
