"""How well is an object cut out of its background, in what time, and does the mesh notice?

`python -m benchmarks.background` puts rendered solids before backgrounds, and compares what is cut out with the true
cut-out: the mean, median and tenth percentile of the intersection over union (IoU) of the masks, and the processor time
in one thread.

objects    64 objects, each with half of the picture's side or more. Every other one stands before a scene's background,
           striped, dotted or busy; the others before a part of a photograph, enlarged and so out of focus
two        16 objects before whole photographs, which show a second thing to look at, such as a face
plain      16 objects before backgrounds of one colour, of which the plain cut needs no network
meshes     of the first 16 objects: volume IoU of the mesh made from the picture and that made from the true cut-out

The solids are of combinations that the shape model's training holds out. The settings of the remover were chosen on
other solids and other parts of the photographs.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.meshes import requests_for
from benchmarks.table import TableRow, finish, show
from models.background.plain import plain_background_alpha
from models.background.remover import load_remover
from models.curve import Preset
from models.engine import Engine
from models.request import MeshRequest, PresetBudget
from models.state import DenoiseState
from models.zoo import load_engine
from training.scenes.rendering import render as render_scenes
from training.scenes.scenes import TONES, Scene
from training.solids.rendering import render as render_solids
from training.solids.sampling import sample_solids
from training.solids.solids import Solid

Pixels = NDArray[np.uint8]

_SIDE = 512
_MARGIN = 8
_FIRST_SOLID = 41 * 10**8
_TEXTURES = ("busy", "striped", "dotted")
_PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle", "brick", "grass", "gravel")
_SHOW_A_SUBJECT = _PHOTOGRAPHS[:5]


@dataclass(frozen=True, slots=True)
class Sample:
    """`picture` `(side, side, 3)` shows the solid; `cut_out` `(side, side, 4)` is what should be cut out of it."""

    solid: Solid
    picture: Pixels
    cut_out: Pixels

    @property
    def is_object(self) -> NDArray[np.bool_]:
        return self.cut_out[..., 3] > 127


def draw_samples(count: int, first: int, background: Callable[[int, random.Random], Pixels]) -> list[Sample]:
    solids = sample_solids(range(_FIRST_SOLID + first, _FIRST_SOLID + first + count), held_out=True)
    samples = []
    for number, solid in enumerate(tqdm(solids, desc="pictures")):
        rng = random.Random(f"background-{first + number}")
        cut_out = _placed(render_solids([solid], [first + number], _SIDE)[0].numpy(), rng)
        alpha = cut_out[..., 3:] / np.float32(255)
        picture = cut_out[..., :3] * alpha + background(number, rng) * (1 - alpha)
        samples.append(Sample(solid, picture.round().astype(np.uint8), cut_out))
    return samples


def _placed(rendered: Pixels, rng: random.Random) -> Pixels:
    """The object with 50 to 85% of the side, up to 10% of the side away from the middle."""
    rows, columns = (np.flatnonzero(rendered[..., 3].any(axis=axis)) for axis in (1, 0))
    cut_out = rendered[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = _SIDE * rng.uniform(0.5, 0.85) / max(cut_out.shape[:2])
    width, height = (round(length * scale) for length in cut_out.shape[1::-1])
    cut_out = _resized(cut_out, width, height, cv2.INTER_AREA)
    top, left = (
        min(max(round((_SIDE - length) / 2 + _SIDE * rng.uniform(-0.1, 0.1)), _MARGIN), _SIDE - _MARGIN - length)
        for length in (height, width)
    )
    canvas = np.zeros((_SIDE, _SIDE, 4), np.uint8)
    canvas[top : top + height, left : left + width] = cut_out
    return canvas


def scene_or_part_of_photograph(number: int, rng: random.Random) -> Pixels:
    if number % 2 == 0:
        return _scene(number // 2, _TEXTURES[number // 2 % len(_TEXTURES)])
    return _photograph(_PHOTOGRAPHS[number // 2 % len(_PHOTOGRAPHS)], rng.uniform(0.2, 0.5), rng)


def whole_photograph(number: int, rng: random.Random) -> Pixels:
    return _photograph(_SHOW_A_SUBJECT[number % len(_SHOW_A_SUBJECT)], rng.uniform(0.8, 1), rng)


def plain(number: int, rng: random.Random) -> Pixels:
    return _scene(number, "plain")


def _scene(number: int, texture: str) -> Pixels:
    """A scene without objects."""
    tone = TONES[number // len(_TEXTURES) % len(TONES)]
    scene = Scene((), tone, texture, (), (), mentions_background=True, relation=None, is_terse=False, seed=number)
    image = render_scenes([scene], _SIDE)[0].permute(1, 2, 0)
    return ((image + 1) * 127.5).round().to(torch.uint8).numpy()


def _photograph(name: str, share: float, rng: random.Random) -> Pixels:
    """A square part of a photograph that scikit-image ships, `share` of its shorter side."""
    shown = getattr(skimage.data, name)()
    photograph: Pixels = shown[0] if isinstance(shown, tuple) else shown  # a stereo pair
    if photograph.ndim == 2:
        photograph = np.dstack((photograph, photograph, photograph))
    height, width = photograph.shape[:2]
    side = int(share * min(height, width))
    top, left = rng.randint(0, height - side), rng.randint(0, width - side)
    part = photograph[top : top + side, left : left + side]
    return _resized(part, _SIDE, _SIDE, cv2.INTER_CUBIC)


def _resized(pixels: Pixels, width: int, height: int, interpolation: int) -> Pixels:
    return cv2.resize(pixels, (width, height), interpolation=interpolation).astype(np.uint8)


def judge(name: str, samples: Sequence[Sample], cut: Callable[[Pixels], Pixels]) -> tuple[TableRow, list[float]]:
    """A row of the table, and the IoU of each sample."""
    ious, seconds = [], []
    for sample in tqdm(samples, desc=name):
        began = time.process_time()
        alpha = cut(sample.picture)
        seconds.append(time.process_time() - began)
        found = alpha > 127
        ious.append(float((found & sample.is_object).sum() / (found | sample.is_object).sum()))
    row: TableRow = {
        "cut by": name,
        "mean_iou": statistics.fmean(ious),
        "median_iou": statistics.median(ious),
        "tenth_percentile": float(np.quantile(ious, 0.1)),
        "below_0.9": sum(iou < 0.9 for iou in ious),
        "median_cpu_seconds": statistics.median(seconds),
    }
    return row, ious


def compare_meshes(engine: Engine, model: str, samples: Sequence[Sample]) -> list[TableRow]:
    """Of each sample: the IoU of the mesh from the picture with that from the true cut-out, at `exact`."""
    requests = requests_for(engine, model, [sample.solid for sample in samples], PresetBudget(Preset.EXACT))
    rows: list[TableRow] = []
    for number, (sample, request) in enumerate(zip(tqdm(samples, desc="meshes"), requests, strict=True)):
        done = [_denoise(engine, request, pixels) for pixels in (sample.picture, sample.cut_out)]
        rows.append({"object": number, "volume_iou": engine.similarity(model, *map(engine.quality_sample, done))})
    return rows


def _denoise(engine: Engine, request: MeshRequest, pixels: Pixels) -> DenoiseState:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    state = engine.start(replace(request, input_image=file.getvalue()))
    while not state.is_done:
        engine.step([state])
    return state


def draw_sheet(samples: Sequence[Sample], alphas: Sequence[Pixels], columns: int) -> Image.Image:
    """Each picture above what was cut out of it, on white."""
    side = 96
    sheet = Image.new("RGB", (columns * side, -(-len(samples) // columns) * 2 * side), "white")
    for number, (sample, alpha) in enumerate(zip(samples, alphas, strict=True)):
        left, top = number % columns * side, number // columns * 2 * side
        picture = Image.fromarray(sample.picture)
        cut_out = Image.new("RGB", picture.size, "white")
        cut_out.paste(picture, mask=Image.fromarray(alpha))
        for image, y in ((picture, top), (cut_out, top + side)):
            sheet.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left, y))
    return sheet


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remover", type=Path, default=Path("checkpoints/u2netp"))
    parser.add_argument("--model", type=Path, default=Path("checkpoints/tiny-hunyuan3d"))
    parser.add_argument("--objects", type=int, default=64)
    parser.add_argument("--meshes", type=int, default=16)
    parser.add_argument("--sheet", type=Path, help="write a sheet of the first 16 objects to this PNG file")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    remover = load_remover(arguments.remover)

    def network_alone(picture: Pixels) -> Pixels:
        probabilities = remover.probabilities(_resized(picture, 320, 320, cv2.INTER_AREA))
        return _resized((probabilities * 255).astype(np.uint8), _SIDE, _SIDE, cv2.INTER_LINEAR)

    def of_whole_object(picture: Pixels) -> Pixels:
        return remover.alpha(picture, is_whole=True)

    def plain_cut(picture: Pixels) -> Pixels:
        alpha = plain_background_alpha(picture)
        assert alpha is not None
        return alpha

    cuts = {"network alone": network_alone, "remover": of_whole_object}
    objects = draw_samples(arguments.objects, 0, scene_or_part_of_photograph)
    sets = {
        "objects": (objects, cuts),
        "two": (draw_samples(arguments.objects // 4, 1000, whole_photograph), cuts),
        "plain": (
            draw_samples(arguments.objects // 4, 2000, plain),
            {"plain cut": plain_cut, "remover": of_whole_object},
        ),
    }
    result: dict[str, object] = {"benchmark": "background", "environment": environment()}
    for name, (samples, cuts_of_set) in sets.items():
        judged = {cut_name: judge(cut_name, samples, cut) for cut_name, cut in cuts_of_set.items()}
        rows = [row for row, _ in judged.values()]
        show(f"{len(samples)} pictures: {name}", rows)
        result[name] = {"count": len(samples), "rows": rows, "iou": {key: own for key, (_, own) in judged.items()}}
    if arguments.sheet:
        shown = objects[:16]
        draw_sheet(shown, [of_whole_object(sample.picture) for sample in shown], columns=8).save(arguments.sheet)
    engine = load_engine(
        [arguments.model],
        device="cpu",
        router_weights=Path("router_weights"),
        background_remover=arguments.remover,
    )
    rows = compare_meshes(engine, arguments.model.name, objects[: arguments.meshes])
    ious = [float(row["volume_iou"] or 0) for row in rows]
    summary: list[TableRow] = [
        {"meshes": len(rows), "mean_volume_iou": statistics.fmean(ious), "median": statistics.median(ious)}
    ]
    show("Meshes from pictures and from true cut-outs", summary)
    result["meshes"] = {"summary": summary[0], "rows": rows}
    finish(result, arguments.json)


if __name__ == "__main__":
    main()
