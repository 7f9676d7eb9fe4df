"""The demo: start a server, ask each of its models for the same at every budget, lay the pictures side by side.

Run as `python -m examples.demo --out demo`. It is a client like any other: it knows the HTTP contract and nothing else.
"""

import argparse
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx2
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from elastic_dit_client import ApiError, Client
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
# For models whose guidance is true. The prompt leaves the background open, so that the negative one can steer it.
GUIDED_PROMPT = "a large green ring in the centre"
NEGATIVE_PROMPT = "a plain dark background"
SOLID = Path("docs/images/solid.png")
SEED = 7
_READY_TIMEOUT_S = 180.0
_REQUEST_TIMEOUT_S = 300.0
_CELL = 256  # pixels a side of a picture on the sheet
_GAP = 12
_LINE = 24
_INK, _FAINT, _PAPER = (20, 20, 24), (96, 96, 104), (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Row:
    """What all pictures of a row on the sheet have in common: everything but the budget."""

    model: str
    prompt: str
    negative_prompt: str | None = None

    @property
    def title(self) -> str:
        title = f"{self.model}: {self.prompt}"
        return title if self.negative_prompt is None else f"{title} (negative prompt: {self.negative_prompt})"


@dataclass(frozen=True, slots=True)
class Made:
    """What was really done at one budget, as the server answered."""

    row: Row
    preset: Preset
    receipt: dict[str, Any]

    @property
    def seconds(self) -> float:
        """From arrival to answer, by the server's clock."""
        return float(self.receipt["seconds"]["total"])

    @property
    def compute_ratio(self) -> float:
        return float(self.receipt["compute_ratio"])

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
class Drawn(Made):
    """One picture with that."""

    picture: Image.Image


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures (default: demo)")
    parser.add_argument("--models", help="model directories to serve, separated by commas (default: the server's)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        running_server(options.models, options.out / "server.log") as address,
        Client(address, timeout_s=_REQUEST_TIMEOUT_S) as client,
    ):
        drawn = draw_all(client)
        meshes = make_meshes(client, options.out)
    save(drawn, options.out)
    print(table([*drawn, *meshes]))
    print(f"\nThe pictures side by side: {options.out / 'contact_sheet.png'}")
    if meshes:
        print(f"The meshes of {SOLID}, to open in any viewer of glTF: {options.out / 'mesh-*.glb'}")


@contextmanager
def running_server(models: str | None, log_path: Path) -> Iterator[str]:
    """A server in a process of its own, on a free port that only this machine sees. Gives its address.

    `models` are directories separated by commas; None are the server's default models.
    """
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    script = Path(sys.executable).with_name("elastic-dit")
    command = [str(script), "serve", "--host", "127.0.0.1", "--port", str(port)]
    if models is not None:
        command += ["--models", models]
    print(f"Starting a server at {address} ...")
    with log_path.open("w") as log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process:
        try:
            _wait_until_ready(address, process, log_path)
            yield address
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(address: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    reason = "it did not answer"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemExit(f"The server ended with status {process.returncode}:\n{_tail(log_path)}")
        try:
            response = httpx2.get(f"{address}/readyz", timeout=5)
        except httpx2.TransportError as error:
            reason = str(error)
        else:
            if response.status_code == 200:
                return
            reason = response.text
        time.sleep(0.2)
    raise SystemExit(f"The server was not ready after {_READY_TIMEOUT_S:.0f} s ({reason}):\n{_tail(log_path)}")


def _tail(log_path: Path) -> str:
    lines = log_path.read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-20:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()


def draw_all(client: Client) -> list[Drawn]:
    """Every row of every model at every budget that the model offers, one request at a time, exact first.

    A model's first row is drawn once before and thrown away, so that no time shown holds a first call's set-up.
    """
    drawn = []
    for model in models_of(client, "image"):
        presets = presets_of(model)
        rows = rows_of(model)
        todo = [(row, preset) for row in (rows[0], *rows) for preset in presets]
        progress = tqdm(todo, desc=model["id"], unit="picture", leave=False)
        drawn += [draw(client, row, preset) for row, preset in progress][len(presets) :]
    return drawn


def models_of(client: Client, modality: str) -> list[dict[str, Any]]:
    return [model for model in client.models() if model["modality"] == modality]


def presets_of(model: dict[str, Any]) -> list[Preset]:
    return [Preset(point["preset"]) for point in model["curve"] if point["preset"]]


def make_meshes(client: Client, folder: Path) -> list[Made]:
    """A mesh of the same picture by every mesh model at every budget, written to `folder`; the first is made twice."""
    made = []
    for model in models_of(client, "mesh"):
        row, presets = Row(model["id"], f"a mesh of {SOLID}"), presets_of(model)
        progress = tqdm([presets[0], *presets], desc=model["id"], unit="mesh", leave=False)
        made += [make_mesh(client, row, preset, folder) for preset in progress][1:]
    return made


def make_mesh(client: Client, row: Row, preset: Preset, folder: Path) -> Made:
    with exit_if_refused(f"/v1/meshes of {row.model} at budget {preset}"):
        result = client.generate_mesh(SOLID, model=row.model, seed=SEED, budget={"preset": preset})
    (folder / f"mesh-{preset}.glb").write_bytes(result.files[0])
    return Made(row, preset, result.receipt)


def rows_of(model: dict[str, Any]) -> list[Row]:
    """What to ask `model`, an entry of /v1/models, for."""
    if model["guidance"] == Guidance.TRUE:
        return [Row(model["id"], GUIDED_PROMPT), Row(model["id"], GUIDED_PROMPT, NEGATIVE_PROMPT)]
    return [Row(model["id"], prompt) for prompt in PROMPTS]


def draw(client: Client, row: Row, preset: Preset) -> Drawn:
    with exit_if_refused(f"/v1/images of {row.model} at budget {preset}"):
        result = client.generate_image(**asdict(row), seed=SEED, budget={"preset": preset})
    picture = Image.open(io.BytesIO(result.files[0])).convert("RGB")
    return Drawn(row, preset, result.receipt, picture)


@contextmanager
def exit_if_refused(asked: str) -> Iterator[None]:
    try:
        yield
    except ApiError as error:
        raise SystemExit(f"{asked} answered {error}") from error


def save(drawn: Sequence[Drawn], folder: Path) -> None:
    """Write the contact sheet, each picture, and all receipts."""
    contact_sheet(drawn).save(folder / "contact_sheet.png")
    rows = list(dict.fromkeys(entry.row for entry in drawn))
    records = []
    for entry in drawn:
        name = f"{rows.index(entry.row) + 1}-{entry.preset}.png"
        entry.picture.save(folder / name)
        records.append({"picture": name, **asdict(entry.row), "budget": entry.preset, "receipt": entry.receipt})
    (folder / "receipts.json").write_text(json.dumps(records, indent=2) + "\n")


def contact_sheet(drawn: Sequence[Drawn]) -> Image.Image:
    """All pictures on one sheet: a column for each budget, the measured figures under each picture.

    `drawn` goes row by row. A budget that a row's model does not offer leaves its place empty.
    """
    rows = [(row, list(entries)) for row, entries in groupby(drawn, key=lambda entry: entry.row)]
    presets = [preset for preset in Preset if any(entry.preset == preset for entry in drawn)]
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
            sheet.paste(entry.picture.resize((_CELL, _CELL), Image.Resampling.BICUBIC), (left, top + _LINE))
            text = "\n".join(figures(entry))
            ink.multiline_text((left, top + _LINE + _CELL + 4), text, _INK, ImageFont.load_default(17))
    return sheet


def figures(entry: Drawn) -> tuple[str, str]:
    """What stands under a picture."""
    return (
        f"{entry.seconds:.2f} s, compute {entry.compute_ratio:.0%}",
        f"skipped {entry.skip_rate:.0%}, reused {entry.reuse_rate:.0%}",
    )


def _font_that_fits(text: str, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font, from 17 points down, in which `text` is at most `width` pixels wide."""
    for size in range(17, 8, -1):
        font = ImageFont.load_default(size)
        if font.getlength(text) <= width:
            return font
    return ImageFont.load_default(8)


def table(drawn: Sequence[Made]) -> str:
    """The same figures as text, row by row, with each budget's mean at the end of each model's."""
    lines = [f"{'budget':<9} {'seconds':>8} {'compute':>8} {'skipped':>8} {'reused':>8}"]
    for model, of_model in groupby(drawn, key=lambda entry: entry.row.model):
        entries = list(of_model)
        by_row = [(row, list(of_row)) for row, of_row in groupby(entries, key=lambda entry: entry.row)]
        for row, of_row in by_row:
            lines += ["", row.title, *(_table_line([entry]) for entry in of_row)]
        lines += ["", f"{model}: mean of {len(by_row)} rows"]
        presets = dict.fromkeys(entry.preset for entry in entries)
        lines += [_table_line([entry for entry in entries if entry.preset == preset]) for preset in presets]
    return "\n".join(lines)


def _table_line(entries: Sequence[Made]) -> str:
    return (
        f"{entries[0].preset:<9} {fmean(e.seconds for e in entries):>8.2f}"
        f" {fmean(e.compute_ratio for e in entries):>8.1%}"
        f" {fmean(e.skip_rate for e in entries):>8.1%} {fmean(e.reuse_rate for e in entries):>8.1%}"
    )


if __name__ == "__main__":
    main()
