"""Measures how fast meshes are decoded here, so that their seconds can be predicted."""

import time

import torch
from torch import Tensor

from models.card import DecodeSpeed
from models.file_formats import MeshFormat
from models.mesh.file import make_mesh_file
from models.mesh.size import num_grid_points
from models.mesh.surface import BOUNDS
from models.mesh.volume import Field, decode_in_turns, finished, sample_in_turns

_OCTREE_RESOLUTION = 128
"""The smallest grid with two levels."""


@torch.inference_mode()
def measure_decode_speed(field: Field, *, points_per_call: int, device: torch.device) -> DecodeSpeed:
    """The speed of reading `field`, and of making a mesh of a ball; half a second on a CPU."""
    points = torch.rand((points_per_call, 3), generator=torch.Generator().manual_seed(0)).to(device)
    field_s = min(_seconds_to_read(field, points) for _ in range(3))  # the first call warms up
    began = time.perf_counter()
    grid_logits = finished(
        decode_in_turns(_ball, _OCTREE_RESOLUTION, points_per_call=num_grid_points(_OCTREE_RESOLUTION), device=device)
    )
    decoded = time.perf_counter()
    # The points of the coarse level, which are all known: seconds a face do not depend on the resolution.
    samples = finished(sample_in_turns(grid_logits[::2, ::2, ::2].contiguous()))
    began_file = time.perf_counter()
    num_faces = make_mesh_file(samples, None, MeshFormat.GLB).report.num_faces
    return DecodeSpeed(
        field_point=field_s / points_per_call,
        grid_point=(decoded - began) / num_grid_points(_OCTREE_RESOLUTION),
        face=(time.perf_counter() - began_file) / num_faces,
    )


def _ball(points: Tensor) -> Tensor:
    distance: Tensor = points.norm(dim=1)
    return 0.8 * BOUNDS - distance


def _seconds_to_read(field: Field, points: Tensor) -> float:
    began = time.perf_counter()
    field(points).cpu()  # waits for the device
    return time.perf_counter() - began
