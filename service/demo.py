"""The demo: start a server, ask it for the same pictures at every budget, lay them side by side.

Run as `python -m service.demo --out demo`. It is a client like any other: it knows the HTTP contract and nothing else.
"""

import argparse
import base64
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx2
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from models.request import Preset

PROMPTS = (
    "a large red circle in the centre, on a plain light background",
    "a small blue square at the top left, a large yellow triangle at the bottom right, on a plain grey background",
    "a large purple cross at the top left, a small cyan circle at the top right, "
    "a large white ring at the bottom left, on a striped grey background",
    "a large green ring at the top left, a small white cross at the top right, "
    "a large purple square at the bottom left, a small red circle at the bottom right, on a busy dark background",
)
SEED = 7
_READY_TIMEOUT_S = 180.0
_REQUEST_TIMEOUT_S = 300.0
_CELL = 256  # pixels a side of a picture on the sheet
_GAP = 12
_LINE = 24
_INK, _FAINT, _PAPER = (20, 20, 24), (96, 96, 104), (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Drawn:
    """One picture and its receipt, as the server answered."""

    prompt: str
    preset: Preset
    picture: Image.Image
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m service.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures (default: demo)")
    parser.add_argument("--model", default="checkpoints/tiny-flux", help="model directory to serve")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        running_server(options.model, options.out / "server.log") as address,
        httpx2.Client(base_url=address, timeout=_REQUEST_TIMEOUT_S) as client,
    ):
        drawn = draw_all(client)
    save(drawn, options.out)
    print(table(drawn))
    print(f"\nThe pictures side by side: {options.out / 'contact_sheet.png'}")


@contextmanager
def running_server(model: str, log_path: Path) -> Iterator[str]:
    """A server of `model` in a process of its own, on a free port that only this machine sees. Gives its address."""
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    script = Path(sys.executable).with_name("elastic-dit")
    command = [str(script), "serve", "--host", "127.0.0.1", "--port", str(port), "--models", model]
    print(f"Starting {model} at {address} ...")
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


def draw_all(client: httpx2.Client) -> list[Drawn]:
    """Every prompt at every budget, one request at a time: prompts in order, budgets from exact to draft.

    One picture for each budget is drawn before and thrown away, so that no time shown holds a first call's set-up.
    """
    with tqdm(total=len(Preset) * (1 + len(PROMPTS)), unit="picture", leave=False) as bar:
        for preset in Preset:
            draw(client, PROMPTS[0], preset)
            bar.update()
        drawn = []
        for prompt in PROMPTS:
            for preset in Preset:
                drawn.append(draw(client, prompt, preset))
                bar.update()
    return drawn


def draw(client: httpx2.Client, prompt: str, preset: Preset) -> Drawn:
    body = {"prompt": prompt, "seed": SEED, "budget": {"preset": preset}}
    response = client.post("/v1/images", json=body)
    if response.status_code != 200:
        raise SystemExit(f"POST /v1/images at budget {preset} answered {response.status_code}: {response.text}")
    result = response.json()
    picture = Image.open(io.BytesIO(base64.b64decode(result["data"][0]["b64_json"]))).convert("RGB")
    return Drawn(prompt, preset, picture, result["receipt"])


def save(drawn: Sequence[Drawn], folder: Path) -> None:
    """Write the contact sheet, each picture, and all receipts."""
    contact_sheet(drawn).save(folder / "contact_sheet.png")
    records = []
    for entry in drawn:
        name = f"{PROMPTS.index(entry.prompt) + 1}-{entry.preset}.png"
        entry.picture.save(folder / name)
        records.append({"picture": name, "prompt": entry.prompt, "budget": entry.preset, "receipt": entry.receipt})
    (folder / "receipts.json").write_text(json.dumps(records, indent=2) + "\n")


def contact_sheet(drawn: Sequence[Drawn]) -> Image.Image:
    """All pictures on one sheet: a row for each prompt, a column for each budget, the measured figures under each.

    `drawn` goes prompt by prompt, with the same budgets in the same order for each.
    """
    presets = list(dict.fromkeys(entry.preset for entry in drawn))
    rows = [drawn[start : start + len(presets)] for start in range(0, len(drawn), len(presets))]
    row_height = _LINE + _CELL + 2 * _LINE + 2 * _GAP
    width = _GAP + len(presets) * (_CELL + _GAP)
    sheet = Image.new("RGB", (width, _GAP + 2 * _LINE + len(rows) * row_height), _PAPER)
    ink = ImageDraw.Draw(sheet)
    lefts = [_GAP + column * (_CELL + _GAP) for column in range(len(presets))]
    for left, preset in zip(lefts, presets, strict=True):
        ink.text((left, _GAP), preset, _INK, ImageFont.load_default(24))
    for number, row in enumerate(rows):
        top = _GAP + 2 * _LINE + number * row_height
        ink.text((_GAP, top), row[0].prompt, _FAINT, _font_that_fits(row[0].prompt, width - 2 * _GAP))
        for left, entry in zip(lefts, row, strict=True):
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


def table(drawn: Sequence[Drawn]) -> str:
    """The same figures as text, prompt by prompt, with each budget's mean at the end."""
    lines = [f"{'budget':<9} {'seconds':>8} {'compute':>8} {'skipped':>8} {'reused':>8}"]
    groups: dict[str, list[Drawn]] = {}
    for entry in drawn:
        groups.setdefault(entry.prompt, []).append(entry)
    for prompt, entries in groups.items():
        lines += ["", prompt, *(_table_line([entry]) for entry in entries)]
    lines += ["", f"mean of {len(groups)} prompts"]
    lines += [_table_line([e for e in drawn if e.preset == p]) for p in dict.fromkeys(e.preset for e in drawn)]
    return "\n".join(lines)


def _table_line(entries: Sequence[Drawn]) -> str:
    return (
        f"{entries[0].preset:<9} {fmean(e.seconds for e in entries):>8.2f}"
        f" {fmean(e.compute_ratio for e in entries):>8.1%}"
        f" {fmean(e.skip_rate for e in entries):>8.1%} {fmean(e.reuse_rate for e in entries):>8.1%}"
    )


if __name__ == "__main__":
    main()
