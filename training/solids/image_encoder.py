"""The small DINOv2 that encodes images of solids.

Three tasks teach it (see `training.solids.image_tasks`). Its tokens then say which surface is where, in depth too,
before the denoiser reads them. The denoiser would need the longest time to learn that; its training leaves the encoder
unchanged.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.families.hunyuan3d.conditioner import DinoImageEncoder, Dinov2Model, SingleImageEncoder
from training.loop import run_loop
from training.optimizers import ScheduledOptimizers, split_optimizers, warm_then_linear
from training.precision import autocast
from training.solids.image_tasks import CHANNELS, PATCH, PartHead, Probe, SurfaceHead, part_targets, surface_targets
from training.solids.images import SIDE, prepared, training_images, training_part_maps, training_surface_maps
from training.solids.parts import PartDescriptions, describe
from training.solids.rendering import render
from training.solids.sampling import sample_solids, training_solids
from training.solids.shape_vae import field_iou, field_loss
from training.solids.solids import Solid, SolidBatch
from training.solids.surfaces import PointPool
from training.solids.symmetry import NUM_SYMMETRIES, turn_images, turn_points

_BATCH_SIZE = 32
"""Samples of a step in each process."""
_NUM_LOOKED_AT = 64
_SHARE_OF_SINGLES = 0.125
"""Share of single primitives among the training samples. They are 40 % of the solids, and are soon learned."""
_NUM_FIELD_POINTS = 128
CONDITIONER_PARAMS: dict[str, Any] = {
    "main_image_encoder": {
        "type": "DinoImageEncoder",
        "kwargs": {
            "config": {
                "hidden_size": CHANNELS,
                "num_hidden_layers": 6,
                "num_attention_heads": 6,
                "mlp_ratio": 4,
                "image_size": SIDE,
                "patch_size": PATCH,
                "layerscale_value": 1.0,
            },
            "image_size": SIDE,
            "use_cls_token": True,
        },
    }
}


def build_conditioner() -> SingleImageEncoder:
    """A new encoder. Its tokens start with their position in the image, its layers start as the identity."""
    torch.manual_seed(1)
    conditioner = SingleImageEncoder(**CONDITIONER_PARAMS)
    model = _dinov2(conditioner)
    waves = _positions(SIDE // PATCH)
    projection = model.embeddings.patch_embeddings["projection"]
    assert isinstance(projection, nn.Conv2d)
    with torch.no_grad():
        for name, module in model.encoder.named_modules():
            if name.endswith(("output.dense", "mlp.fc2")):
                assert isinstance(module, nn.Linear)
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
        projection.weight[: waves.shape[-1]] = 0
        if projection.bias is not None:
            projection.bias[: waves.shape[-1]] = 0
        nn.init.normal_(model.embeddings.cls_token, std=0.5)
        model.embeddings.position_embeddings[:, 1:, : waves.shape[-1]] = waves
    return conditioner


def _dinov2(conditioner: SingleImageEncoder) -> Dinov2Model:
    assert isinstance(conditioner.main_image_encoder, DinoImageEncoder)
    return conditioner.main_image_encoder.model


def _positions(side: int) -> Tensor:
    """Sine and cosine, in two octaves, of the patch centres' x and y in [-1, 1], y pointing up: `(side * side, 8)`."""
    middles = (torch.arange(side) + 0.5) * (2 / side) - 1
    y, x = torch.meshgrid(-middles, middles, indexing="ij")
    angles = torch.stack((x, y, 2 * x, 2 * y), -1).flatten(0, 1)
    return torch.cat((angles.sin(), angles.cos()), -1)


class ConditionerObjective(nn.Module):
    """The losses of one training step. The encoder and its heads are the modules `conditioner`, `probe`, and so on."""

    def __init__(self, conditioner: SingleImageEncoder, folder: Path, num_solids: int) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.probe = Probe()
        self.head = SurfaceHead()
        self.part_head = PartHead()
        self._pool = PointPool(folder, num_solids)
        self._images = training_images(folder, num_solids)
        self._surface_maps = training_surface_maps(folder, num_solids)
        self._part_maps = training_part_maps(folder, num_solids)
        solids = training_solids(0, num_solids)
        self._parts = describe(solids)
        self._weights = draw_weights(solids)

    def forward(self, rng: torch.Generator) -> dict[str, Tensor]:
        """Draw a batch and return the losses by name: `field`, `surface`, `kind` and `part`."""
        rows = self._weights.multinomial(_BATCH_SIZE, generator=rng)
        points, target = self._pool.field_samples(rows, _NUM_FIELD_POINTS, rng)
        symmetries = torch.randint(NUM_SYMMETRIES, (_BATCH_SIZE,), generator=rng)
        images, points = turn_images(self._images[rows], symmetries), turn_points(points, symmetries)
        surface, is_known = surface_targets(self._surface_maps[rows], symmetries)
        parts = PartDescriptions(self._parts.kinds[rows], self._parts.vectors[rows])
        kinds, vectors = part_targets(self._part_maps[rows], parts, symmetries)
        with autocast():
            tokens = self.conditioner(images / 127.5 - 1)
            field_error = field_loss(self.probe(tokens, points), target)
            predicted_surface = self.head(tokens)
            predicted_kinds, predicted_vectors = self.part_head(tokens)
        return {
            "field": field_error,
            "surface": F.smooth_l1_loss(predicted_surface.float()[is_known], surface[is_known], beta=0.1),
            "kind": F.cross_entropy(predicted_kinds.float()[is_known], kinds[is_known]),
            "part": F.smooth_l1_loss(predicted_vectors.float()[is_known], vectors[is_known], beta=0.1),
        }


def draw_weights(solids: Sequence[Solid]) -> Tensor:
    """The probability of each solid to be drawn for a batch."""
    is_single = torch.tensor([solid.operation is None for solid in solids])
    num_single = int(is_single.sum())
    return torch.where(
        is_single, _SHARE_OF_SINGLES / max(num_single, 1), (1 - _SHARE_OF_SINGLES) / max(len(solids) - num_single, 1)
    )


def train_conditioner(
    conditioner: SingleImageEncoder, run_dir: Path, *, num_solids: int, num_steps: int, rank: int, num_processes: int
) -> None:
    """Train, or resume, on the first `num_solids` training solids, as process `rank` of `num_processes`."""
    torch.manual_seed(2)
    objective = ConditionerObjective(conditioner, run_dir / "solids", num_solids)
    optimizers = split_optimizers(objective, matrix_lr=0.02, lr=1e-3)
    schedule = partial(warm_then_linear, num_steps=num_steps, warm_up=50, hold=0.3, end=0.01)
    scheduled = ScheduledOptimizers(optimizers, schedule, num_processes=num_processes)
    for layer in _dinov2(conditioner).encoder.layer:
        layer.compile(dynamic=False)

    def train_step(step: int) -> dict[str, float]:
        losses = objective(torch.Generator().manual_seed(step * 64 + rank))
        loss = losses["field"] + 2 * losses["surface"] + 0.1 * losses["kind"] + 2 * losses["part"]
        scheduled.minimise(loss, step)
        return {name: value.item() for name, value in losses.items()}

    run_loop(
        "conditioner",
        num_steps,
        train_step,
        {**dict(objective.named_children()), "matrices": optimizers[0], "others": optimizers[1]},
        run_dir / "conditioner.pt",
        save_every=500,
        look=_look(objective) if rank == 0 else None,
        is_main=rank == 0,
    )
    conditioner.eval()


def _look(objective: ConditionerObjective) -> Callable[[int], None]:
    """Prints the IoU of the probe's field with held-out solids."""
    held_out = sample_solids(range(10**9, 10**9 + _NUM_LOOKED_AT), held_out=True)
    images = prepared(render(held_out, range(_NUM_LOOKED_AT), SIDE))

    @torch.no_grad()
    def look(step: int) -> None:
        field = partial(objective.probe, objective.conditioner(images))
        iou = field_iou(field, SolidBatch(held_out), torch.Generator().manual_seed(1))
        print(f"  step {step}: median IoU of held-out images {iou.median():.4f}", flush=True)

    return look
