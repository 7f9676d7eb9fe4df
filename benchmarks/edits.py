"""Do edits of pictures keep the quality that is promised for generations?

`python -m benchmarks.edits` edits drawn scenes with prompts that change one of their objects: as many cases image to
image as inpainting over random masks about that object. Every case runs at `exact` and at the budget `--quality`, with
the same seed. Quality is `Engine.similarity` of the two results, over the whole image and, for inpainting, over the
mask's bounding box too. `--sheet` draws the cases that change most: picture, mask, exact result, elastic result.
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from benchmarks.engine import requests_for
from benchmarks.environment import environment
from benchmarks.table import TableRow, finish, show
from models.budget import resolve
from models.curve import Preset
from models.engine import Engine
from models.file_formats import OutputFormat, encode_image
from models.report import GenerationSummary
from models.request import ImageEdit, ImageRequest, PresetBudget, QualityBudget
from models.zoo import load_engine
from training.scenes.prompts import evaluation_scenes
from training.scenes.rendering import object_map, render
from training.scenes.scenes import COLOURS, SHAPES, Scene

Pixels = NDArray[np.uint8]

STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MASK_STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_BATCH_SIZE = 8
_SHEET_ROWS = 3


@dataclass(frozen=True, slots=True)
class Case:
    """One edit: its request at the exact budget, the picture, and where pixels may change, if there is a mask."""

    request: ImageRequest
    picture: Pixels
    changes: NDArray[np.bool_] | None

    @property
    def strength(self) -> float:
        assert self.request.edit is not None
        assert self.request.edit.strength is not None
        return self.request.edit.strength


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a case; the qualities are similarities to the exact result."""

    case: Case
    exact: Pixels
    elastic: Pixels
    summary: GenerationSummary
    quality: float
    quality_in_mask: float | None


def cases_for(engine: Engine, model: str, count: int) -> list[Case]:
    """`count` cases without a mask, then as many with one. Of both, half of the scenes have a single object."""
    scenes = evaluation_scenes(count, count)
    scenes = [*scenes[: count // 2], *scenes[count : count + count - count // 2]]
    scenes = [scene for pair in zip(scenes, scenes[::-1], strict=True) for scene in pair][:count]
    changed = [with_another_object(scene) for scene in scenes]
    places = [_place(*pair) for pair in zip(scenes, changed, strict=True)]
    requests = requests_for(engine, model, changed, PresetBudget(Preset.EXACT))
    side = requests[0].height
    drawn = ((render(scenes, side).movedim(1, -1) + 1) * 127.5).round().byte().numpy()
    cases = []
    for has_mask in (False, True):
        for number, (request, picture) in enumerate(zip(requests, drawn, strict=True)):
            changes = random_mask(side, places[number], random.Random(f"mask-{number}")) if has_mask else None
            edit = ImageEdit(
                (encode_image(picture, OutputFormat.PNG),),
                None if changes is None else _mask_file(changes),
                (MASK_STRENGTHS if has_mask else STRENGTHS)[number % len(STRENGTHS)],
            )
            cases.append(Case(replace(request, edit=edit), picture, changes))
    return cases


def with_another_object(scene: Scene) -> Scene:
    """The scene with another shape and colour of one of its objects."""
    rng = random.Random(f"edit-{scene.seed}")
    index = rng.randrange(len(scene.objects))
    old = scene.objects[index]
    new = replace(
        old,
        shape=rng.choice([shape for shape in SHAPES if shape != old.shape]),
        colour=rng.choice([colour for colour in COLOURS if colour != old.colour]),
    )
    return replace(scene, objects=(*scene.objects[:index], new, *scene.objects[index + 1 :]))


def _place(scene: Scene, changed: Scene) -> tuple[float, float]:
    """Where the object is that differs: its centre, as shares of the width and of the height."""
    [index] = [i for i, (a, b) in enumerate(zip(scene.objects, changed.objects, strict=True)) if a != b]
    rows, columns = np.nonzero(object_map([scene], 32)[0].numpy() == index)
    return (columns.mean() + 0.5) / 32, (rows.mean() + 0.5) / 32


def random_mask(side: int, place: tuple[float, float], rng: random.Random) -> NDArray[np.bool_]:
    """A rectangle or an ellipse about `place`, a quarter to three quarters of the image wide and high."""
    width, height = (rng.randint(side // 4, 3 * side // 4) for _ in range(2))
    left, top = (
        min(max(round(side * (centre + rng.uniform(-0.1, 0.1)) - length / 2), 0), side - length)
        for centre, length in zip(place, (width, height), strict=True)
    )
    image = Image.new("1", (side, side))
    pen = ImageDraw.Draw(image)
    draw = pen.rectangle if rng.random() < 0.5 else pen.ellipse
    draw((left, top, left + width - 1, top + height - 1), fill=1)
    return np.asarray(image)


def _mask_file(changes: NDArray[np.bool_]) -> bytes:
    alpha = np.where(changes, 0, 255).astype(np.uint8)
    return encode_image(np.dstack((np.zeros((*changes.shape, 3), np.uint8), alpha)), OutputFormat.PNG)


def run(engine: Engine, requests: Sequence[ImageRequest]) -> list[tuple[Pixels, GenerationSummary]]:
    """The results of `requests`, which run together."""
    states = [engine.start(request) for request in requests]
    while present := [state for state in states if not state.is_done]:
        engine.step(present)
    results = []
    for state in states:
        pixels = engine.finish(state)
        assert isinstance(pixels, np.ndarray)
        results.append((pixels, state.summary()))
    return results


def outcome_of(engine: Engine, case: Case, exact: Pixels, elastic: Pixels, summary: GenerationSummary) -> Outcome:
    model, quality_in_mask = case.request.model, None
    if case.changes is not None:
        rows, columns = (np.flatnonzero(case.changes.any(axis)) for axis in (1, 0))
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        quality_in_mask = engine.similarity(model, elastic[box], exact[box])
    return Outcome(case, exact, elastic, summary, engine.similarity(model, elastic, exact), quality_in_mask)


def measure(engine: Engine, model: str, cases: Sequence[Case], quality: float) -> list[Outcome]:
    budget, card, outcomes = QualityBudget(quality), engine.cards[model], []
    for first in tqdm(range(0, len(cases), _BATCH_SIZE), desc=model, unit="batch", mininterval=2):
        batch = cases[first : first + _BATCH_SIZE]
        exact = run(engine, [case.request for case in batch])
        elastic = run(
            engine,
            [
                replace(case.request, budget=budget, point=resolve(budget, card.curve_for(case.request)))
                for case in batch
            ],
        )
        outcomes += [
            outcome_of(engine, case, exact_pixels, *result)
            for case, (exact_pixels, _), result in zip(batch, exact, elastic, strict=True)
        ]
    return outcomes


def table_row(name: str, outcomes: Sequence[Outcome], qualities: Sequence[float], promised: float) -> TableRow:
    return {
        "what": name,
        "cases": str(len(outcomes)),
        "reach it": statistics.fmean(quality >= promised for quality in qualities),
        "tenth": float(np.quantile(qualities, 0.1)),
        "lowest": min(qualities),
        "mean": statistics.fmean(qualities),
        "compute": statistics.fmean(outcome.summary.compute_ratio for outcome in outcomes),
    }


def rows_of(outcomes: Sequence[Outcome], promised: float) -> list[TableRow]:
    plain = [outcome for outcome in outcomes if outcome.case.changes is None]
    masked = [outcome for outcome in outcomes if outcome.case.changes is not None]
    rows = [
        table_row("image to image", plain, [outcome.quality for outcome in plain], promised),
        table_row("inpainting", masked, [outcome.quality for outcome in masked], promised),
        table_row(
            "  in its box", masked, [o.quality_in_mask for o in masked if o.quality_in_mask is not None], promised
        ),
    ]
    for strength in sorted({*STRENGTHS, *MASK_STRENGTHS}):
        chosen = [outcome for outcome in outcomes if outcome.case.strength == strength]
        lowest = [min(o.quality, o.quality_in_mask or 1.0) for o in chosen]
        if chosen:
            rows.append(table_row(f"strength {strength}", chosen, lowest, promised))
    return rows


def sheet_of(outcomes: Sequence[Outcome]) -> Image.Image:
    """The cases of each kind that change most, one a row: picture, mask, exact result, elastic result."""

    def change(outcome: Outcome) -> float:
        return float(np.abs(outcome.exact.astype(int) - outcome.case.picture).mean())

    ranked = sorted(outcomes, key=change, reverse=True)
    parts = ([o for o in ranked if o.case.changes is None], [o for o in ranked if o.case.changes is not None])
    chosen = [outcome for part in parts for outcome in part[:_SHEET_ROWS]]
    side, gap, line = outcomes[0].exact.shape[0], 8, 62
    sheet = Image.new("RGB", (4 * (side + gap) + gap, len(chosen) * (side + line + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for row, outcome in enumerate(chosen):
        top = gap + row * (side + line + gap)
        mask = np.full((side, side), True) if outcome.case.changes is None else outcome.case.changes
        images = (outcome.case.picture, np.where(mask, 255, 0).astype(np.uint8), outcome.exact, outcome.elastic)
        for column, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (gap + column * (side + gap), top))
        summary, inside = outcome.summary, outcome.quality_in_mask
        text = f"{fill(outcome.case.request.prompt, 85)}\nstrength {outcome.case.strength}: "
        text += f"{summary.num_steps_computed} of {summary.num_steps_computed + summary.num_steps_forecast} steps, "
        text += f"SSIM {outcome.quality:.3f}" + (f", {inside:.3f} in the mask's box" if inside is not None else "")
        pen.multiline_text((gap, top + side + 2), text, "black", font)
    return sheet


def case_entry(outcome: Outcome) -> dict[str, Any]:
    return {
        "seed": outcome.case.request.seed,
        "strength": outcome.case.strength,
        "has_mask": outcome.case.changes is not None,
        "steps_computed": outcome.summary.num_steps_computed,
        "steps_forecast": outcome.summary.num_steps_forecast,
        "quality": round(outcome.quality, 5),
        "quality_in_mask": outcome.quality_in_mask and round(outcome.quality_in_mask, 5),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the quality of elastic edits.")
    parser.add_argument("--model", action="append", type=Path, help="model directory; may be repeated")
    parser.add_argument("--router-weights", type=Path, default=Path("router_weights"))
    parser.add_argument("--cases", type=int, default=32, help="of each kind")
    parser.add_argument("--quality", type=float, default=0.95)
    parser.add_argument("--sheet", type=Path, help="PNG file; the model's id goes before its name")
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for directory in args.model or [Path("checkpoints/tiny-flux"), Path("checkpoints/tiny-qwen-image")]:
        engine = load_engine([directory], device="cpu", router_weights=args.router_weights)
        model = directory.name
        outcomes = measure(engine, model, cases_for(engine, model, args.cases), args.quality)
        rows = rows_of(outcomes, args.quality)
        show(f"{model}: edits at quality {args.quality} against exact ones", rows)
        found[model] = {"rows": rows, "cases": [case_entry(outcome) for outcome in outcomes]}
        if args.sheet:
            sheet_of(outcomes).save(args.sheet.with_name(f"{model}-{args.sheet.name}"), optimize=True)
    finish({"quality": args.quality, "models": found, **environment()}, args.json)


if __name__ == "__main__":
    main()
