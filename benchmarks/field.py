"""How much decoding time does coarse-to-fine save, and does it find the same surface?

`python -m benchmarks.field` decodes held-out solids in turn on a dense grid and coarse to fine, and extracts both
surfaces.

evaluated  share of the dense grid's points that coarse-to-fine evaluated
dense_s    seconds for the dense grid
fine_s     seconds for coarse-to-fine, including the search for the points
time_ratio fine_s over dense_s; low and high are the extremes of all rounds
surface_s  seconds for the triangles, from the coarse-to-fine grid
vertices   number of vertices of the dense grid's mesh
distance   the largest distance in voxels from a vertex of the dense grid's mesh to the nearest vertex of the other mesh

With `--model`, a checkpoint trained here, the fields come from its autoencoder. Without it, they are the solids' own
distances, clipped like such a field. Then an untrained autoencoder of the same size also evaluates every point, and its
result is ignored, so that a point has a realistic cost.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from scipy.spatial import cKDTree
from torch import Tensor
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.table import TableRow, finish, show
from models.families.hunyuan3d.checkpoint import load_checkpoint
from models.families.hunyuan3d.shape_vae import ShapeVAE
from models.mesh.surface import BOUNDS, Mesh, extract_surface
from models.mesh.volume import Field, decode_dense, decode_in_turns, finished
from training.solids.sampling import sample_solids
from training.solids.shape_vae import NUM_DATA_POINTS, build_shape_vae, encode
from training.solids.solids import Solid, SolidBatch
from training.solids.surfaces import BAND

_FIRST_SOLID = 3 * 10**9
"""Far from the solids of training, calibration and other measurements."""


class CountedField:
    """A field that counts the points at which it is evaluated."""

    def __init__(self, field: Field) -> None:
        self.field = field
        self.num_points = 0

    def __call__(self, points: Tensor) -> Tensor:
        self.num_points += len(points)
        return self.field(points)


@torch.inference_mode()
def decoded_field(vae: ShapeVAE, solid: Solid, device: torch.device) -> Field:
    """The field that the autoencoder decodes from an encoded solid."""
    surface = torch.cat(SolidBatch([solid]).surface_points(NUM_DATA_POINTS, torch.Generator().manual_seed(0)), dim=-1)
    return vae.field(encode(vae, surface.to(device)))


@torch.inference_mode()
def true_field(vae: ShapeVAE, solid: Solid, device: torch.device) -> Field:
    """The solid's own field, evaluated on the CPU, at the cost of the autoencoder's field."""
    batch = SolidBatch([solid])
    cost = vae.field(torch.randn(1, vae.num_latents, vae.embed_dim, device=device))

    def field(points: Tensor) -> Tensor:
        cost(points)
        return (batch.signed_distance(points.cpu()[None])[0] / BAND).clamp(-1, 1).to(device)

    return field


def largest_distance(of: Mesh, to: Mesh) -> float:
    """Largest distance from a vertex of `of` to the nearest vertex of `to`; an upper bound of that to its surface."""
    distances, _ = cKDTree(to.vertices).query(of.vertices)
    return float(distances.max())


def measure(
    name: str, measured: Field, octree_resolution: int, points_per_call: int, device: torch.device, num_rounds: int
) -> TableRow:
    """The columns above, for one solid."""
    dense_s, fine_s = [], []
    field = CountedField(measured)
    for _ in tqdm(range(num_rounds), desc=f"{name} at {octree_resolution}"):
        started = time.perf_counter()
        dense = decode_dense(field, octree_resolution, points_per_call=points_per_call, device=device).cpu()
        dense_s.append(time.perf_counter() - started)
        field.num_points = 0
        started = time.perf_counter()
        fine = finished(decode_in_turns(field, octree_resolution, points_per_call=points_per_call, device=device)).cpu()
        fine_s.append(time.perf_counter() - started)
    started = time.perf_counter()
    mesh = extract_surface(fine.numpy())
    surface_s = time.perf_counter() - started
    dense_mesh = extract_surface(dense.numpy())
    ratios = [fine / dense for fine, dense in zip(fine_s, dense_s, strict=True)]
    return {
        "name": name,
        "cells": octree_resolution,
        "evaluated": field.num_points / dense.numel(),
        "dense_s": statistics.median(dense_s),
        "fine_s": statistics.median(fine_s),
        "time_ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "surface_s": surface_s,
        "vertices": len(dense_mesh.vertices),
        "distance": largest_distance(dense_mesh, mesh) * octree_resolution / (2 * BOUNDS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="for example checkpoints/tiny-hunyuan3d")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[128, 256], metavar="CELLS")
    parser.add_argument("--solids", type=int, default=3)
    parser.add_argument("--points", type=int, default=2048, help="points per call; use many more on a GPU")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    if arguments.model:
        vae, field_of = load_checkpoint(arguments.model, arguments.device, torch.float32).vae, decoded_field
    else:
        vae, field_of = build_shape_vae().eval().to(device), true_field
    solids = sample_solids(range(_FIRST_SOLID, _FIRST_SOLID + arguments.solids), held_out=True)
    rows: list[TableRow] = []
    for solid in solids:
        field = field_of(vae, solid, device)
        with torch.inference_mode():
            field(torch.zeros(arguments.points, 3, device=device))  # warms up
        name = f"{solid.operation}: " + ", ".join(part.kind for part in solid.parts)
        rows += [
            measure(name, field, resolution, arguments.points, device, arguments.rounds)
            for resolution in arguments.resolutions
        ]
    show("Coarse-to-fine over the dense grid", rows)
    result: dict[str, object] = {
        "benchmark": "field",
        "model": arguments.model.name if arguments.model else None,
        "environment": environment(),
        "run_on": arguments.device,
        "points_per_call": arguments.points,
        "rounds": arguments.rounds,
        "decodes": rows,
    }
    finish(result, arguments.json)


if __name__ == "__main__":
    main()
