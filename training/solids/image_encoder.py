"""The small DINOv2 that reads pictures of solids, trained to tell shapes from their pictures.

Three parts that are thrown away teach it: a head that names place and normal of the surface that each patch shows, one
that names the primitive which that surface belongs to, hidden sides included, and a probe that reads the field at any
point from all tokens. So the tokens tell what is where, in depth too, before the denoiser sees them, which is what it
would take longest to find out. The denoiser's training leaves the encoder as it is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.families.hunyuan3d.conditioner import DinoImageEncoder, Dinov2Model, SingleImageEncoder
from models.families.hunyuan3d.shape_vae import GeometryDecoder, fourier_features
from training.base import average_gradients, split_optimizers
from training.loop import run_loop, warm_then_linear
from training.precision import autocast
from training.solids.images import CELLS, SIDE, prepared, training_parts, training_pictures, training_surfaces
from training.solids.parts import NUM_KINDS, NUM_VECTORS, Parts, describe
from training.solids.rendering import render
from training.solids.shape_vae import compare, field_iou, field_loss, pass_on
from training.solids.solids import Solid, SolidBatch, sample_solids, training_solids
from training.solids.surfaces import SurfacePool

CHANNELS = 192
_PATCH = 14
_CELLS_OF_PATCH = (CELLS * _PATCH // SIDE) ** 2
_BATCH_SIZE = 32  # a process
_NUM_LOOKED_AT = 64
_SHARE_OF_SINGLES = 0.125
"""Of the solids that are shown: single primitives, 40 % of those drawn, are soon learned."""

_NUM_FIELD_POINTS = 128
_NUM_FREQUENCIES = 6
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
                "patch_size": _PATCH,
                "layerscale_value": 1.0,
            },
            "image_size": SIDE,
            "use_cls_token": True,
        },
    }
}


def build_conditioner() -> SingleImageEncoder:
    """A new encoder whose tokens know where in the picture they are, and whose layers begin as the identity."""
    torch.manual_seed(1)
    conditioner = SingleImageEncoder(**CONDITIONER_PARAMS)
    model = _dinov2(conditioner)
    waves = _places(SIDE // _PATCH)
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


def _places(side: int) -> Tensor:
    """Sine and cosine of x and y of the patches' middles, `(side * side, 8)`, of two octaves, x in [-1, 1], y up."""
    middles = (torch.arange(side) + 0.5) * (2 / side) - 1
    y, x = torch.meshgrid(-middles, middles, indexing="ij")
    angles = torch.stack((x, y, 2 * x, 2 * y), -1).flatten(0, 1)
    return torch.cat((angles.sin(), angles.cos()), -1)


def turn_pictures(pictures: Tensor, ways: Tensor) -> Tensor:
    """Mirror and turn pictures `(batch, channels, side, side)`, each its own way.

    `ways` `(batch,)` are 0 to 7, the symmetries of the square. The camera sees a solid turned by `turn_points` as the
    picture turned here.
    """
    turned = []
    for picture, way in zip(pictures, ways.tolist(), strict=True):
        picture = picture.flip(-1) if way & 1 else picture
        picture = picture.flip(-2) if way & 2 else picture
        turned.append(picture.mT if way & 4 else picture)
    return torch.stack(turned)


def turn_points(points: Tensor, ways: Tensor) -> Tensor:
    """The same for points or vectors `(batch, points, 3)`."""
    x, y, z = points.unbind(-1)
    x = torch.where((ways & 1 > 0)[:, None], -x, x)
    y = torch.where((ways & 2 > 0)[:, None], -y, y)
    is_swapped = (ways & 4 > 0)[:, None]
    return torch.stack((torch.where(is_swapped, -y, x), torch.where(is_swapped, -x, y), z), -1)


class SurfaceHead(nn.Module):
    """Names place and normal in each cell of a patch: `(batch, patches, cells, 6)` of `(batch, tokens, channels)`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, 6 * _CELLS_OF_PATCH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens[:, 1:]).unflatten(-1, (_CELLS_OF_PATCH, 6))


class PartHead(nn.Module):
    """Names the part that each cell of a patch shows: scores `(batch, patches, cells, NUM_KINDS)`, and its vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, _CELLS_OF_PATCH * (NUM_KINDS + 3 * NUM_VECTORS))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        named = self.linear(tokens[:, 1:]).unflatten(-1, (_CELLS_OF_PATCH, -1))
        kinds, vectors = named.split((NUM_KINDS, 3 * NUM_VECTORS), dim=-1)
        return kinds, vectors.unflatten(-1, (NUM_VECTORS, 3))


def part_targets(shown: Tensor, parts: Parts, ways: Tensor) -> tuple[Tensor, Tensor]:
    """What PartHead should say: the kinds `(batch, patches, cells)`, and the vectors.

    `shown` are maps of `training_parts`, turned `ways`.
    """
    slots = _cells(shown, ways)[..., 0].long()
    vectors = turn_points(parts.vectors.flatten(1, 2), ways).view_as(parts.vectors)
    # Rows of matrices have been turned; now their columns.
    columns = vectors[:, :, 1:4].mT
    vectors[:, :, 1:4] = turn_points(columns.flatten(1, 2), ways).view_as(columns).mT
    rows = torch.arange(len(ways))[:, None, None]
    return parts.kinds[rows, slots], vectors[rows, slots]


def _cells(maps: Tensor, ways: Tensor) -> Tensor:
    """Maps `(batch, channels, CELLS, CELLS)`, turned, by patch: `(batch, patches, cells, channels)`."""
    side = SIDE // _PATCH
    cells = turn_pictures(maps, ways).unflatten(-1, (side, -1)).unflatten(-3, (side, -1))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2)


def surface_targets(maps: Tensor, ways: Tensor) -> tuple[Tensor, Tensor]:
    """What SurfaceHead should say, and of which cells, `(batch, patches, cells)`: those that show nothing but surface.

    `maps` are those of `training_surfaces`, turned `ways`.
    """
    cells = _cells(maps, ways)
    values, alpha = cells.float() / 127.5 - 1, cells[..., 6]
    vectors = [turn_points(values[..., first : first + 3].flatten(1, 2), ways) for first in (0, 3)]
    return torch.cat(vectors, dim=-1).view(*values.shape[:3], 6), alpha == 255


class Probe(nn.Module):
    """Reads the field `(batch, points)` at points `(batch, points, 3)` from a picture's tokens."""

    def __init__(self) -> None:
        super().__init__()
        columns = 3 + 6 * _NUM_FREQUENCIES
        self.decoder = GeometryDecoder(columns, CHANNELS, 6, False, True, 2, 1, True)
        attention = self.decoder.cross_attn_decoder.attn
        # Begin by looking where a point lies in the picture.
        of_point = [3 + axis * _NUM_FREQUENCIES + octave for octave in (0, 1) for axis in (0, 1)]
        of_point += [column + 3 * _NUM_FREQUENCIES for column in of_point]
        pass_on(self.decoder.query_proj, range(columns), scale=1.5)
        for head in range(6):
            compare(attention, head, of_point, range(8))

    def forward(self, tokens: Tensor, points: Tensor) -> Tensor:
        features = fourier_features(points, _NUM_FREQUENCIES, include_pi=False)
        logits: Tensor = self.decoder(features, *self.decoder.keys_and_values(tokens))
        return logits


def draw_weights(solids: Sequence[Solid]) -> Tensor:
    """How likely each is shown."""
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
    probe, head, part_head = Probe(), SurfaceHead(), PartHead()
    pool = SurfacePool(run_dir / "solids", num_solids)
    pictures = training_pictures(run_dir / "solids", num_solids)
    surfaces = training_surfaces(run_dir / "solids", num_solids)
    solids = training_solids(0, num_solids)
    shown, parts = training_parts(run_dir / "solids", num_solids), describe(solids)
    weights = draw_weights(solids)
    modules = nn.ModuleDict({"conditioner": conditioner, "probe": probe, "head": head, "part_head": part_head})
    parameters = [p for p in modules.parameters() if p is not _dinov2(conditioner).embeddings.mask_token]
    optimizers = split_optimizers(modules, matrix_lr=0.02, lr=1e-3)
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    held_out = sample_solids(range(10**9, 10**9 + _NUM_LOOKED_AT), held_out=True)
    of_held_out = prepared(render(held_out, range(_NUM_LOOKED_AT), SIDE))
    for layer in _dinov2(conditioner).encoder.layer:
        layer.compile(dynamic=False)

    def train_step(step: int) -> dict[str, float]:
        rng = torch.Generator().manual_seed(step * 64 + rank)
        rows = weights.multinomial(_BATCH_SIZE, generator=rng)
        points, target = pool.field(rows, _NUM_FIELD_POINTS, rng)
        ways = torch.randint(8, (_BATCH_SIZE,), generator=rng)
        seen, points = turn_pictures(pictures[rows], ways), turn_points(points, ways)
        on_surface, is_known = surface_targets(surfaces[rows], ways)
        of_rows = Parts(parts.kinds[rows], parts.vectors[rows])
        kinds, vectors = part_targets(shown[rows], of_rows, ways)
        factor = warm_then_linear(step, num_steps, warm_up=50, hold=0.3, end=0.01)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, base in zip(groups, base_rates, strict=True):
            group["lr"] = base * factor
        with autocast():
            tokens = conditioner(seen / 127.5 - 1)
            field = field_loss(probe(tokens, points), target)
            named = head(tokens)
            named_kinds, named_vectors = part_head(tokens)
        surface = F.smooth_l1_loss(named.float()[is_known], on_surface[is_known], beta=0.1)
        kind = F.cross_entropy(named_kinds.float()[is_known], kinds[is_known])
        part = F.smooth_l1_loss(named_vectors.float()[is_known], vectors[is_known], beta=0.1)
        loss = field + 2 * surface + 0.1 * kind + 2 * part
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters, num_processes)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        return {"field": field.item(), "surface": surface.item(), "kind": kind.item(), "part": part.item()}

    @torch.no_grad()
    def look(step: int) -> None:
        tokens = conditioner(of_held_out)
        iou = field_iou(lambda points: probe(tokens, points), SolidBatch(held_out), torch.Generator().manual_seed(1))
        print(f"  step {step}: median IoU of held-out pictures {iou.median():.4f}", flush=True)

    run_loop(
        "conditioner",
        num_steps,
        train_step,
        {**modules, "matrices": optimizers[0], "others": optimizers[1]},
        run_dir / "conditioner.pt",
        save_every=500,
        look=look if rank == 0 else None,
        is_main=rank == 0,
    )
    conditioner.eval()
