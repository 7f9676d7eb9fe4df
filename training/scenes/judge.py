"""The judge: a small CNN that reads from a picture what stands where, and the score that follows from its reading.

It is trained on true scenes only, never on generated ones: it learns no model's mistakes. Scoring follows
GenEval (Ghosh et al. 2023, https://arxiv.org/abs/2310.11513): a prompt counts as followed if the picture holds the
objects that the caption tells, as it tells them, and nothing else.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import WeightsError
from training.loop import Stateful, run_loop, warm_then_linear
from training.precision import autocast
from training.scenes.rendering import attribute_targets, render
from training.scenes.scenes import COLOURS, POSITIONS, SHAPES, SIZES, TEXTURES, TONES, Scene, SceneObject, sample_scene

NUM_STEPS = 600
BATCH_SIZE = 64
FIRST_SCENE = 5_000_000  # far from every other seed range
_NUM_SCENES = 8192
_FIRST_TEST_SCENE = 6_000_000
_NUM_TEST_SCENES = 1024
_SEED = 5
_WINDOW = 4  # cells of the 8x8 feature map, a side, that a place is read from
_WINDOW_CORNER = {  # row and column of the window's first cell
    "top left": (0, 0),
    "top right": (0, 4),
    "bottom left": (4, 0),
    "bottom right": (4, 4),
    "centre": (2, 2),
}
_MIRRORED = [POSITIONS.index(p) for p in ("top right", "top left", "bottom right", "bottom left", "centre")]
_NOTHING = len(SHAPES)


@dataclass(frozen=True, slots=True)
class Reading:
    """What the judge sees in one picture; objects in the order of `scenes.POSITIONS`."""

    objects: tuple[SceneObject, ...]
    tone: str
    texture: str


@dataclass(frozen=True, slots=True)
class PromptAccuracy:
    """How well pictures follow their captions, as shares in [0, 1].

    `per_object`: objects told and found, over objects told. `per_scene`: pictures with every told object and no other
    one; as in GenEval the background does not count. `by_attribute`: `shape`, `colour` and `size` over told objects,
    `count` over pictures, and over the captions that tell it `tone`, `texture` and `background`, which is both.
    """

    per_object: float
    per_scene: float
    by_attribute: Mapping[str, float]


class Judge(nn.Module):
    """Reads 128x128 pictures. Every place is read by the same head, from its own window of the feature map.

    The sharing matters: no training scene shows a held-out (shape, colour, position), but a window that may lie
    anywhere has seen every shape in every colour.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(*_conv(3, 24, 4, 2), *_conv(24, 40, 3, 2), *_conv(40, 64, 3, 1))
        self.coarse = nn.Sequential(*_conv(64, 80, 3, 2), *_conv(80, 96, 3, 2), *_conv(96, 96, 3, 1))
        self.place_head = nn.Sequential(
            nn.Linear(96 * _WINDOW**2, 128), nn.SiLU(), nn.Linear(128, len(SHAPES) + 1 + len(COLOURS) + len(SIZES))
        )
        self.background_head = nn.Sequential(
            nn.Linear(2 * 64 + 96, 64), nn.SiLU(), nn.Linear(64, len(TONES) + len(TEXTURES))
        )

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits for pictures `(batch, 3, 128, 128)` in [-1, 1], named and placed as in `attribute_targets`.

        `shape`, `colour` and `size` are `(batch, places, classes)`, `tone` and `texture` `(batch, classes)`.
        """
        fine = self.fine(pictures)
        coarse = self.coarse(fine)
        windows = torch.stack([_window(coarse, place).flatten(1) for place in POSITIONS], 1)
        seen = self.place_head(windows).split((len(SHAPES) + 1, len(COLOURS), len(SIZES)), -1)
        pooled = torch.cat((fine.mean((2, 3)), fine.amax((2, 3)), coarse.mean((2, 3))), 1)
        background = self.background_head(pooled).split((len(TONES), len(TEXTURES)), -1)
        return dict(zip(("shape", "colour", "size", "tone", "texture"), (*seen, *background), strict=True))

    @torch.no_grad()
    def read(self, pictures: Tensor) -> list[Reading]:
        """What is in each of the pictures `(batch, 3, 128, 128)` in [-1, 1]."""
        if pictures.shape[1:] != (3, 128, 128):
            raise ValueError(f"pictures are {tuple(pictures.shape)}; the judge reads (batch, 3, 128, 128)")
        readings: list[Reading] = []
        for part in torch.split(pictures.float(), 64):
            best = {name: logits.argmax(-1).tolist() for name, logits in self(part).items()}
            for i in range(len(part)):
                found = zip(POSITIONS, best["shape"][i], best["colour"][i], best["size"][i], strict=True)
                objects = tuple(
                    SceneObject(SHAPES[shape], COLOURS[colour], SIZES[size], position)
                    for position, shape, colour, size in found
                    if shape != _NOTHING
                )
                readings.append(Reading(objects, TONES[best["tone"][i]], TEXTURES[best["texture"][i]]))
        return readings

    def score(self, scenes: Sequence[Scene], pictures: Tensor) -> PromptAccuracy:
        """How well pictures `(batch, 3, 128, 128)`, generated from the captions of `scenes`, follow them."""
        return score_readings(scenes, self.read(pictures))


def load_judge(folder: Path) -> Judge:
    """Read a judge that `save_judge` wrote; it computes in float32."""
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    digest = hashlib.sha256(weights).hexdigest()
    if digest != manifest["sha256"]:
        raise WeightsError(
            f"{folder / 'model.safetensors'} has sha256 {digest}; its manifest says {manifest['sha256']}"
        )
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load(weights).items()})
    return judge.eval()


def score_readings(scenes: Sequence[Scene], readings: Sequence[Reading]) -> PromptAccuracy:
    """Compare what was found with what the captions tell."""
    verdicts = [_judge_scene(scene, reading) for scene, reading in zip(scenes, readings, strict=True)]
    tallies: dict[str, list[bool]] = {}
    for verdict in verdicts:
        for name, outcomes in verdict.items():
            tallies.setdefault(name, []).extend(outcomes)
    shares = {name: sum(outcomes) / len(outcomes) for name, outcomes in tallies.items() if outcomes}
    return PromptAccuracy(shares.pop("object"), shares.pop("scene"), shares)


def _judge_scene(scene: Scene, reading: Reading) -> dict[str, list[bool]]:
    """Outcomes by name, under the match of told to found objects that is kindest to the picture."""
    attributes = max(
        ([_attributes(scene, i, found) for i, found in enumerate(match)] for match in _matches(scene, reading.objects)),
        key=lambda match: (sum(all(told.values()) for told in match), sum(sum(told.values()) for told in match)),
    )
    objects = [all(told.values()) for told in attributes]
    count = len(reading.objects) == len(scene.objects)
    outcomes = {"object": objects, "scene": [all(objects) and count], "count": [count]}
    for told in attributes:
        for name, is_right in told.items():
            outcomes.setdefault(name, []).append(is_right)
    if scene.tells_background:
        tone, texture = reading.tone == scene.tone, reading.texture == scene.texture
        outcomes |= {"tone": [tone], "texture": [texture], "background": [tone and texture]}
    return outcomes


def _matches(scene: Scene, found: Sequence[SceneObject]) -> Iterator[tuple[SceneObject | None, ...]]:
    """Every way to give the told objects found ones, or none, that agrees with the places that the caption tells.

    A relation binds only when both of its objects are matched: if they stand the wrong way round, one of them is still
    right and the other one is missing.
    """
    options = [
        (None, *(other for other in found if not told or other.position == thing.position))
        for thing, told in zip(scene.objects, scene.told_positions, strict=True)
    ]
    for match in itertools.product(*options):
        taken = [other.position for other in match if other]
        if len(set(taken)) < len(taken):
            continue
        if scene.relation and len(taken) == 2 and not _holds(scene.relation, taken[0], taken[1]):
            continue
        yield match


def _holds(relation: str, first: str, second: str) -> bool:
    """Whether the first place is left of, right of, above or below the second one, however far off the straight."""
    (row, column), (other_row, other_column) = _WINDOW_CORNER[first], _WINDOW_CORNER[second]
    return {
        "left of": column < other_column,
        "right of": column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[relation]


def _attributes(scene: Scene, index: int, found: SceneObject | None) -> dict[str, bool]:
    thing = scene.objects[index]
    outcome = {
        "shape": found is not None and found.shape == thing.shape,
        "colour": found is not None and found.colour == thing.colour,
    }
    if scene.told_sizes[index]:
        outcome["size"] = found is not None and found.size == thing.size
    return outcome


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.SiLU()


def _window(features: Tensor, place: str) -> Tensor:
    row, column = _WINDOW_CORNER[place]
    return features[:, :, row : row + _WINDOW, column : column + _WINDOW]


def train_judge(run_dir: Path, *, num_steps: int = NUM_STEPS) -> Judge:
    """Train, or resume. About 3 minutes on one core of an AMD EPYC with bfloat16."""
    torch.manual_seed(_SEED)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
    # Held-out combinations are held out from the models judged, not from the judge. Without them it learned that a blue
    # shape at the bottom left is no circle, and read 98.0 % of 492 held-out objects right; with them 99.8 % of 1951.
    scenes = [sample_scene(seed, held_out=seed % 8 == 0) for seed in range(FIRST_SCENE, FIRST_SCENE + _NUM_SCENES)]
    pictures = torch.cat([_to_bytes(render(scenes[i : i + 64])) for i in range(0, _NUM_SCENES, 64)])
    targets = attribute_targets(scenes)

    def train_step(step: int) -> dict[str, float]:
        rng = torch.Generator().manual_seed(step)
        epoch, offset = divmod(step * BATCH_SIZE, _NUM_SCENES)
        order = torch.randperm(_NUM_SCENES, generator=torch.Generator().manual_seed(epoch))
        rows = order[offset : offset + BATCH_SIZE]
        batch = pictures[rows].float() / 127.5 - 1
        truth = {name: target[rows] for name, target in targets.items()}
        if torch.rand(1, generator=rng) < 0.5:
            batch = batch.flip(3)
            truth |= {name: truth[name][:, _MIRRORED] for name in ("shape", "colour", "size")}
        batch = _spoil(batch, rng).contiguous(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * warm_then_linear(step, num_steps, warm_up=30, hold=0.3, end=0.01)
        judge.train()
        with autocast():
            logits = judge(batch)
        losses = [F.cross_entropy(logits[n].float().flatten(0, -2), truth[n].flatten()) for n in truth]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.item()}

    def look(step: int) -> None:
        print(f"  step {step}: {measure(judge.eval(), 256)}", flush=True)

    state: dict[str, Stateful] = {"judge": judge, "optimizer": optimizer}
    run_loop("judge", num_steps, train_step, state, run_dir / "judge.pt", save_every=200, look=look)
    return judge.eval()


def _to_bytes(pictures: Tensor) -> Tensor:
    return ((pictures + 1) * 127.5).round().byte()


def _spoil(pictures: Tensor, rng: torch.Generator) -> Tensor:
    """What a decoder or a JPEG file does to a picture: blur, fine noise, blotches of 4 pixels, a shift of contrast.

    Each picture gets its own strengths; a third of them stay sharp.
    """
    batch = len(pictures)

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(batch, 1, 1, 1).uniform_(low, high, generator=rng)

    blurred = F.avg_pool2d(F.pad(pictures, (2, 2, 2, 2), mode="replicate"), 5, 1)
    result = torch.lerp(pictures, blurred, draw(-0.35, 0.7).clamp(min=0))
    blotches = F.interpolate(torch.randn(batch, 3, 32, 32, generator=rng), size=128, mode="bilinear")
    result = result + draw(0, 0.06) * torch.randn(pictures.shape, generator=rng) + draw(0, 0.06) * blotches
    return (result * draw(0.93, 1.05) + draw(-0.02, 0.02)).clamp(-1, 1)


def measure(judge: Judge, count: int) -> dict[str, float]:
    """Accuracy on `count` true scenes of held-out combinations whose captions tell everything, as shares."""
    scenes = [
        sample_scene(seed, held_out=True, tells_all=True)
        for seed in range(_FIRST_TEST_SCENE, _FIRST_TEST_SCENE + count)
    ]
    readings = [r for i in range(0, count, 64) for r in judge.read(render(scenes[i : i + 64]))]
    accuracy = score_readings(scenes, readings)
    shares = {"per_object": accuracy.per_object, "per_scene": accuracy.per_scene, **accuracy.by_attribute}
    return {name: round(share, 5) for name, share in shares.items()}


def save_judge(judge: Judge, folder: Path, *, num_test_scenes: int = _NUM_TEST_SCENES) -> None:
    """Write the weights in 16 bits, and a manifest with the accuracy that these rounded weights have."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.safetensors"
    judge.half().float().eval()
    floats = {name: value for name, value in judge.state_dict().items() if value.is_floating_point()}
    save_file({name: value.half().contiguous() for name, value in floats.items()}, path)
    manifest = {
        "source": "trained in this repository on scenes drawn by training/scenes/rendering.py",
        "license": "Apache-2.0",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "command": "python -m training.scenes.judge",
        "seed": _SEED,
        "num_steps": NUM_STEPS,
        "training_scenes": [FIRST_SCENE, FIRST_SCENE + _NUM_SCENES - 1],
        "held_out_scenes": [_FIRST_TEST_SCENE, _FIRST_TEST_SCENE + num_test_scenes - 1],
        "accuracy": measure(judge, num_test_scenes),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def main() -> None:
    save_judge(train_judge(Path("runs/judge")), Path("checkpoints/judge"))


if __name__ == "__main__":
    main()
