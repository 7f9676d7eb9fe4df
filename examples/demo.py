"""The demo: start a server, generate the same images and meshes at every budget, and compare them on a contact sheet.

Run it with `python -m examples.demo --out demo`. It uses the HTTP API through the Python client.
"""

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from elastic_dit_client import ApiError, Client
from examples.server_process import ElasticDit, ServerEnded
from models.card import Guidance
from models.curve import Preset

PROMPTS = (
    "a large red circle in the centre, on a plain light background",
    "a small blue square at the top left, a large yellow triangle at the bottom right, on a plain grey background",
    "a large purple cross at the top left, a small cyan circle at the top right, "
    "a large white ring at the bottom left, on a striped grey background",
    "a large green ring at the top left, a small white cross at the top right, "
    "a large purple square at the bottom left, a small red circle at the bottom right, on a busy dark background",
)
# For models with true guidance. The prompt leaves the background open, so that the negative prompt can steer it.
GUIDED_PROMPT = "a large green ring in the centre"
NEGATIVE_PROMPT = "a plain light background"
SOLID = Path(__file__).resolve().parents[1] / "docs" / "images" / "solid.png"
SEED = 7
_REQUEST_TIMEOUT_S = 300.0
_CELL = 256  # side of an image on the sheet, in pixels
_GAP = 12
_LINE = 24
_INK, _FAINT, _PAPER = (20, 20, 24), (96, 96, 104), (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Row:
    """The fields that all images in one row of the sheet share: everything but the budget."""

    model: str
    prompt: str
    negative_prompt: str | None = None

    @property
    def title(self) -> str:
        title = f"{self.model}: {self.prompt}"
        return title if self.negative_prompt is None else f"{title} (negative prompt: {self.negative_prompt})"


@dataclass(frozen=True, slots=True)
class Answer:
    """One request at one budget, with the receipt of what the server computed."""

    row: Row
    preset: Preset
    receipt: dict[str, Any]

    @property
    def seconds(self) -> float:
        """From the request's arrival to its answer, on the server's clock."""
        return float(self.receipt["seconds"]["total"])

    @property
    def compute_ratio(self) -> float:
        return float(self.receipt["compute_ratio"])

    @property
    def num_computed_steps(self) -> int:
        return int(self.receipt["steps"]["computed"])

    @property
    def skip_rate(self) -> float:
        return self._share("skipped")

    @property
    def reuse_rate(self) -> float:
        return self._share("reused")

    def _share(self, decision: str) -> float:
        blocks: dict[str, int] = self.receipt["blocks"]
        return blocks[decision] / sum(blocks.values())


@dataclass(frozen=True, slots=True)
class ImageAnswer(Answer):
    image: Image.Image


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (default: demo)")
    parser.add_argument("--models", help="model directories or names, separated by commas (default: the server's)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        running_server(options.models, options.out / "server.log") as address,
        Client(address, timeout_s=_REQUEST_TIMEOUT_S) as client,
    ):
        images = generate_images(client)
        meshes = generate_meshes(client, options.out)
    save(images, options.out)
    print(table([*images, *meshes]))
    print(f"\nThe images side by side: {options.out / 'contact_sheet.png'}")
    if meshes:
        print(f"The meshes of {SOLID.name}, for any glTF viewer: {options.out / 'mesh-*.glb'}")


@contextmanager
def running_server(models: str | None, log_path: Path) -> Iterator[str]:
    """The address of a server that runs until the block ends. `models` is its option; None takes its default models."""
    print("Starting a server ...")
    options = () if models is None else ("--models", models)
    with ElasticDit("serve", log_path, *options) as server:
        try:
            address = server.wait_until_ready()
        except ServerEnded as error:
            raise SystemExit(str(error)) from error
        yield address


def generate_images(client: Client) -> list[ImageAnswer]:
    """Every row of every image model at every budget that the model offers, one request at a time, exact first.

    Each model generates its first row twice and drops the first one, so that no time includes a first call's set-up.
    """
    answers = []
    for model in models_of(client, "image"):
        presets = presets_of(model)
        rows = rows_of(model)
        todo = [(row, preset) for row in (rows[0], *rows) for preset in presets]
        progress = tqdm(todo, desc=model["id"], unit="image", leave=False)
        answers += [generate_image(client, row, preset) for row, preset in progress][len(presets) :]
    return answers


def models_of(client: Client, modality: str) -> list[dict[str, Any]]:
    return [model for model in client.models() if model["modality"] == modality]


def presets_of(model: dict[str, Any]) -> list[Preset]:
    return [Preset(point["preset"]) for point in model["curve"] if point["preset"]]


def generate_meshes(client: Client, folder: Path) -> list[Answer]:
    """A mesh of SOLID by every mesh model at every budget, written to `folder`. Each makes the first one twice."""
    answers = []
    for model in models_of(client, "mesh"):
        row, presets = Row(model["id"], f"a mesh of {SOLID.name}"), presets_of(model)
        progress = tqdm([presets[0], *presets], desc=model["id"], unit="mesh", leave=False)
        answers += [generate_mesh(client, row, preset, folder) for preset in progress][1:]
    return answers


def generate_mesh(client: Client, row: Row, preset: Preset, folder: Path) -> Answer:
    with exit_if_refused(f"/v1/meshes of {row.model} at budget {preset}"):
        result = client.generate_mesh(SOLID, model=row.model, seed=SEED, budget={"preset": preset})
    (folder / f"mesh-{preset}.glb").write_bytes(result.files[0])
    return Answer(row, preset, result.receipt)


def rows_of(model: dict[str, Any]) -> list[Row]:
    """The rows for `model`, an entry of /v1/models."""
    if model["guidance"] == Guidance.TRUE:
        return [Row(model["id"], GUIDED_PROMPT), Row(model["id"], GUIDED_PROMPT, NEGATIVE_PROMPT)]
    return [Row(model["id"], prompt) for prompt in PROMPTS]


def generate_image(client: Client, row: Row, preset: Preset) -> ImageAnswer:
    with exit_if_refused(f"/v1/images of {row.model} at budget {preset}"):
        result = client.generate_image(**asdict(row), seed=SEED, budget={"preset": preset})
    image = Image.open(io.BytesIO(result.files[0])).convert("RGB")
    return ImageAnswer(row, preset, result.receipt, image)


@contextmanager
def exit_if_refused(call: str) -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        raise SystemExit(f"{call} answered {error}") from error


def save(answers: Sequence[ImageAnswer], folder: Path) -> None:
    """Write the contact sheet, each image, and all receipts."""
    contact_sheet(answers).save(folder / "contact_sheet.png")
    rows = list(dict.fromkeys(entry.row for entry in answers))
    records = []
    for entry in answers:
        name = f"{rows.index(entry.row) + 1}-{entry.preset}.png"
        entry.image.save(folder / name)
        records.append({"image": name, **asdict(entry.row), "budget": entry.preset, "receipt": entry.receipt})
    (folder / "receipts.json").write_text(json.dumps(records, indent=2) + "\n")


def contact_sheet(answers: Sequence[ImageAnswer]) -> Image.Image:
    """All images on one sheet: a column for each budget, and the measured figures under each image.

    `answers` is ordered by row. Where a row's model does not offer a budget, the place stays empty.
    """
    rows = [(row, list(entries)) for row, entries in groupby(answers, key=lambda entry: entry.row)]
    presets = [preset for preset in Preset if any(entry.preset == preset for entry in answers)]
    row_height = _LINE + _CELL + 2 * _LINE + 2 * _GAP
    width = _GAP + len(presets) * (_CELL + _GAP)
    sheet = Image.new("RGB", (width, _GAP + 2 * _LINE + len(rows) * row_height), _PAPER)
    ink = ImageDraw.Draw(sheet)
    lefts = {preset: _GAP + column * (_CELL + _GAP) for column, preset in enumerate(presets)}
    for preset, left in lefts.items():
        ink.text((left, _GAP), preset, _INK, ImageFont.load_default(24))
    for number, (row, entries) in enumerate(rows):
        top = _GAP + 2 * _LINE + number * row_height
        ink.text((_GAP, top), row.title, _FAINT, _font_that_fits(row.title, width - 2 * _GAP))
        for entry in entries:
            left = lefts[entry.preset]
            sheet.paste(entry.image.resize((_CELL, _CELL), Image.Resampling.BICUBIC), (left, top + _LINE))
            text = "\n".join(figures(entry))
            ink.multiline_text((left, top + _LINE + _CELL + 4), text, _INK, ImageFont.load_default(17))
    return sheet


def figures(entry: Answer) -> tuple[str, str]:
    """The two lines under an image."""
    return (
        f"{entry.seconds:.2f} s, compute {entry.compute_ratio:.0%}",
        f"{entry.num_computed_steps} of {entry.receipt['num_inference_steps']} steps, skipped {entry.skip_rate:.0%}",
    )


def _font_that_fits(text: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font, of at most 17 points, in which `text` is at most `width` pixels wide."""
    for size in range(17, 8, -1):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            return font
    return ImageFont.load_default(8)


def table(answers: Sequence[Answer]) -> str:
    """The figures of all answers as text, row by row. Each model ends with the means of its budgets."""
    lines = [f"{'budget':<9} {'seconds':>8} {'compute':>8} {'steps':>6} {'skipped':>8} {'reused':>8}"]
    for model, of_model in groupby(answers, key=lambda entry: entry.row.model):
        entries = list(of_model)
        by_row = [(row, list(of_row)) for row, of_row in groupby(entries, key=lambda entry: entry.row)]
        for row, of_row in by_row:
            lines += ["", row.title, *(_table_line([entry]) for entry in of_row)]
        lines += ["", f"{model}: mean of {len(by_row)} rows"]
        presets = dict.fromkeys(entry.preset for entry in entries)
        lines += [_table_line([entry for entry in entries if entry.preset == preset]) for preset in presets]
    return "\n".join(lines)


def _table_line(entries: Sequence[Answer]) -> str:
    return (
        f"{entries[0].preset:<9} {fmean(e.seconds for e in entries):>8.2f}"
        f" {fmean(e.compute_ratio for e in entries):>8.1%} {fmean(e.num_computed_steps for e in entries):>6.1f}"
        f" {fmean(e.skip_rate for e in entries):>8.1%} {fmean(e.reuse_rate for e in entries):>8.1%}"
    )


if __name__ == "__main__":
    main()
