"""Encoded solids with their pictures' tokens: what the shape model is taught."""

from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

from models.families.hunyuan3d.conditioner import SingleImageEncoder
from models.families.hunyuan3d.shape_vae import ShapeVAE
from training.precision import autocast
from training.scenes.text import Text
from training.solids.image_encoder import turn_pictures, turn_points
from training.solids.images import training_pictures
from training.solids.shape_vae import NUM_DATA_POINTS, encode
from training.solids.solids import training_solids
from training.solids.surfaces import SurfacePool

NUM_SOLIDS = 12_288
NUM_WAYS = 5
"""How often a solid occurs, turned or mirrored at random and seen with other points."""
_EMPTY_SHARE = 0.1  # of the samples have no picture
_BATCH = 64


class SolidLesson:
    """Row i is one encoding of solid `solids[i]`, turned `ways[i]`; see `training.solids.image_encoder`.

    `pictures` are `(solids, 3, side, side)` uint8.
    """

    head: nn.Module | None = None

    def __init__(
        self, latents: Tensor, solids: Tensor, ways: Tensor, pictures: Tensor, conditioner: SingleImageEncoder
    ) -> None:
        self.latents = latents
        self.conditioner = conditioner
        self._solids = solids
        self._ways = ways
        self._pictures = pictures
        # Nothing to see is zeros, by the family's convention.
        self.no_condition = Text(torch.zeros_like(self.full_conditions([0]).embeds), None, None)

    def noise(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Noise whose tokens are given to those of `clean` that are nearest.

        A shape's tokens have no order, so any is as good, and from near ones paths hardly cross (Klein et al. 2023,
        "Equivariant flow matching", https://arxiv.org/abs/2306.15030). All tokens together are still normal noise.
        """
        noise = torch.randn(clean.shape, generator=generator)
        distances = torch.cdist(clean, noise).square().numpy()
        nearest = [torch.from_numpy(linear_sum_assignment(matrix)[1]) for matrix in distances]
        return torch.stack([sample[order] for sample, order in zip(noise, nearest, strict=True)])

    @torch.no_grad()
    def conditions(self, rows: list[int], generator: torch.Generator) -> tuple[Text, Tensor]:
        told = torch.rand(len(rows), generator=generator) >= _EMPTY_SHARE
        return Text(self._tokens(rows) * told[:, None, None], None, None), told

    @torch.no_grad()
    def full_conditions(self, rows: list[int]) -> Text:
        return Text(self._tokens(rows), None, None)

    def _tokens(self, rows: list[int]) -> Tensor:
        seen = turn_pictures(self._pictures[self._solids[rows]], self._ways[rows])
        with autocast():
            return self.conditioner(seen / 127.5 - 1).float()

    def auxiliary_loss(self, output: Tensor, rows: list[int], told: Tensor) -> Tensor:
        raise AssertionError("there is no head whose output could be judged")


@torch.no_grad()
def encode_solids(vae: ShapeVAE, run_dir: Path) -> None:
    """Write the lesson's latents `(samples, tokens, channels)`, in 16 bits, and how each sample is turned."""
    path = run_dir / "latents.pt"
    if path.exists():
        return
    pool = SurfacePool(run_dir / "solids", NUM_SOLIDS)
    latents, ways = [], []
    for first in tqdm(range(0, NUM_WAYS * NUM_SOLIDS, _BATCH), desc="encoding"):
        rng = torch.Generator().manual_seed(first)
        surface = pool.surface(torch.arange(first, first + _BATCH) % NUM_SOLIDS, NUM_DATA_POINTS, rng)
        ways.append(torch.randint(8, (_BATCH,), generator=rng))
        turned = [turn_points(part, ways[-1]) for part in surface.split(3, dim=-1)]
        with autocast():
            latents.append(encode(vae, torch.cat(turned, dim=-1)).half())
    torch.save(torch.cat(ways), run_dir / "ways.pt")
    torch.save(torch.cat(latents), path)


def read_lesson(run_dir: Path, conditioner: SingleImageEncoder) -> SolidLesson:
    """The encoded samples: all of solids of two parts, and of single primitives, which are soon learned, one each."""
    latents, ways = (torch.load(run_dir / name, weights_only=True, mmap=True) for name in ("latents.pt", "ways.pt"))
    solids = torch.arange(len(latents)) % NUM_SOLIDS
    is_single = torch.tensor([solid.operation is None for solid in training_solids(0, NUM_SOLIDS)])
    is_first = torch.arange(len(latents)) < NUM_SOLIDS
    kept = (is_first | ~is_single[solids]).nonzero()[:, 0]
    pictures = training_pictures(run_dir / "solids", NUM_SOLIDS)
    return SolidLesson(latents[kept], solids[kept], ways[kept], pictures, conditioner)
