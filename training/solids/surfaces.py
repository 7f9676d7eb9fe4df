"""Points on and around the training solids, stored in files: drawing them takes longer than training on them."""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from models.mesh.surface import BOUNDS
from training.solids.sampling import training_solids
from training.solids.solids import SolidBatch

BAND = 0.1
"""The distance at which the field saturates. A logit is the signed distance over `BAND`, clipped to [-1, 1]."""

CHUNK = 1024
_POINTS = 1024  # of each solid, on its surface and in its field


class PointPool:
    """Points of the first `count` training solids, in files of `CHUNK` solids each.

    Missing files are drawn and written to `folder`.
    """

    def __init__(self, folder: Path, count: int) -> None:
        chunks = [_read_or_draw(folder, number) for number in tqdm(range(-(-count // CHUNK)), desc="solids")]
        self._surface = [chunk["surface"] for chunk in chunks]
        self._field = [chunk["field"] for chunk in chunks]
        self._count = count

    def __len__(self) -> int:
        return self._count

    def surface_points(self, rows: Tensor, count: int, rng: torch.Generator) -> Tensor:
        """A random choice of the stored surface points with outward normals, `(batch, count, 6)`."""
        return _pick(self._surface, rows, count, rng)

    def field_samples(self, rows: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points `(batch, count, 3)`, half of them near the surface, and the true logits there `(batch, count)`."""
        picked = _pick(self._field, rows, count, rng)
        return picked[..., :3], picked[..., 3]


def draw(seed: int) -> dict[str, Tensor]:
    """Draw chunk number `seed`: `surface` `(CHUNK, points, 6)` and `field` `(CHUNK, points, 4)`, in 16 bits."""
    rng = torch.Generator().manual_seed(seed)
    surfaces, fields = [], []
    for start in range(seed * CHUNK, (seed + 1) * CHUNK, 64):
        batch = SolidBatch(training_solids(start, 64))
        points, normals = batch.surface_points(_POINTS, rng)
        surfaces.append(torch.cat((points, normals), dim=-1).half())
        near = points[:, : _POINTS // 2]
        # Offsets reach from well inside the band to its edge.
        spread = BAND * torch.rand(*near.shape[:2], 1, generator=rng)
        near = (near + spread * torch.randn(near.shape, generator=rng)).clamp(-BOUNDS, BOUNDS)
        anywhere = (2 * torch.rand(near.shape, generator=rng) - 1) * BOUNDS
        where = torch.cat((near, anywhere), dim=1).half()
        logits = (batch.signed_distance(where.float()) / BAND).clamp(-1, 1)
        fields.append(torch.cat((where, logits[..., None].half()), dim=-1))
    return {"surface": torch.cat(surfaces), "field": torch.cat(fields)}


def _read_or_draw(folder: Path, number: int) -> dict[str, Tensor]:
    path = folder / f"{number:03d}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(draw(number), partial)
        partial.replace(path)
    chunk: dict[str, Tensor] = torch.load(path, weights_only=True, mmap=True)
    return chunk


def _pick(chunks: list[Tensor], rows: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """`count` random points of each row."""
    picked = []
    for row in rows.tolist():
        points = chunks[row // CHUNK][row % CHUNK]
        picked.append(points[torch.randperm(len(points), generator=rng)[:count]])
    return torch.stack(picked).float()
