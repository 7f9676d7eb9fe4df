"""The lesson of the shape model: encoded solids and the tokens of their images."""

from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

from models.families.hunyuan3d.conditioner import SingleImageEncoder
from models.families.hunyuan3d.shape_vae import ShapeVAE
from training.lesson import Condition
from training.precision import autocast
from training.solids.images import training_images
from training.solids.sampling import training_solids
from training.solids.shape_vae import NUM_DATA_POINTS, encode
from training.solids.surfaces import PointPool
from training.solids.symmetry import NUM_SYMMETRIES, turn_images, turn_points

NUM_SOLIDS = 12_288
NUM_ENCODINGS = 5
"""Encodings of each solid, each turned by a random symmetry and made from other surface points."""
_EMPTY_SHARE = 0.1
"""Share of the samples without an image."""
_BATCH = 64


class SolidLesson:
    """A `training.lesson.Lesson` whose row i is an encoding of solid `solids[i]`, turned by `symmetries[i]`.

    `images` are `(solids, 3, side, side)` uint8. For symmetries see `training.solids.symmetry`.
    """

    head: nn.Module | None = None

    def __init__(
        self, latents: Tensor, solids: Tensor, symmetries: Tensor, images: Tensor, conditioner: SingleImageEncoder
    ) -> None:
        self.latents = latents
        self.conditioner = conditioner
        self._solids = solids
        self._symmetries = symmetries
        self._images = images
        # In this family, no image means zeros.
        self.no_condition = Condition(torch.zeros_like(self.full_conditions([0]).embeds), None, None)

    def noise(self, clean: Tensor, generator: torch.Generator) -> Tensor:
        """Normal noise whose tokens are assigned to the nearest tokens of `clean`.

        The tokens of a shape have no order, so all assignments are valid. With the nearest ones, flows hardly cross
        (Klein et al. 2023, "Equivariant flow matching", https://arxiv.org/abs/2306.15030). As a set, tokens stay
        normal noise.
        """
        noise = torch.randn(clean.shape, generator=generator)
        distances = torch.cdist(clean, noise).square().numpy()
        nearest = [torch.from_numpy(linear_sum_assignment(matrix)[1]) for matrix in distances]
        return torch.stack([sample[order] for sample, order in zip(noise, nearest, strict=True)])

    @torch.no_grad()
    def conditions(self, rows: list[int], generator: torch.Generator) -> tuple[Condition, Tensor]:
        is_complete = torch.rand(len(rows), generator=generator) >= _EMPTY_SHARE
        return Condition(self._tokens(rows) * is_complete[:, None, None], None, None), is_complete

    @torch.no_grad()
    def full_conditions(self, rows: list[int]) -> Condition:
        return Condition(self._tokens(rows), None, None)

    def _tokens(self, rows: list[int]) -> Tensor:
        images = turn_images(self._images[self._solids[rows]], self._symmetries[rows])
        with autocast():
            return self.conditioner(images / 127.5 - 1).float()

    def auxiliary_loss(self, output: Tensor, rows: list[int], is_complete: Tensor) -> Tensor:
        raise AssertionError("this lesson has no head and so no auxiliary loss")


@torch.no_grad()
def encode_solids(vae: ShapeVAE, run_dir: Path) -> None:
    """Write the lesson's latents `(samples, tokens, channels)`, in 16 bits, and the symmetry of each sample."""
    path = run_dir / "latents.pt"
    if path.exists():
        return
    pool = PointPool(run_dir / "solids", NUM_SOLIDS)
    latents, symmetries = [], []
    for first in tqdm(range(0, NUM_ENCODINGS * NUM_SOLIDS, _BATCH), desc="encoding"):
        rng = torch.Generator().manual_seed(first)
        surface = pool.surface_points(torch.arange(first, first + _BATCH) % NUM_SOLIDS, NUM_DATA_POINTS, rng)
        symmetries.append(torch.randint(NUM_SYMMETRIES, (_BATCH,), generator=rng))
        turned = [turn_points(vectors, symmetries[-1]) for vectors in surface.split(3, dim=-1)]
        with autocast():
            latents.append(encode(vae, torch.cat(turned, dim=-1)).half())
    torch.save(torch.cat(symmetries), run_dir / "ways.pt")
    torch.save(torch.cat(latents), path)


def read_lesson(run_dir: Path, conditioner: SingleImageEncoder) -> SolidLesson:
    """Read the encoded samples: all encodings of solids of two parts, one encoding of each single primitive.

    The model learns single primitives soon, so one encoding is enough.
    """
    latents = torch.load(run_dir / "latents.pt", weights_only=True, mmap=True)
    symmetries = torch.load(run_dir / "ways.pt", weights_only=True, mmap=True)
    solids = torch.arange(len(latents)) % NUM_SOLIDS
    is_single = torch.tensor([solid.operation is None for solid in training_solids(0, NUM_SOLIDS)])
    is_first = torch.arange(len(latents)) < NUM_SOLIDS
    kept = (is_first | ~is_single[solids]).nonzero()[:, 0]
    images = training_images(run_dir / "solids", NUM_SOLIDS)
    return SolidLesson(latents[kept], solids[kept], symmetries[kept], images, conditioner)
