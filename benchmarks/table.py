"""Output of benchmarks: tables for people, one line of JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

TableRow = dict[str, float | str | None]


def show(title: str, rows: Sequence[TableRow]) -> None:
    lines = [[*rows[0]], *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(14, *map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)), flush=True)


def _cell(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "-" if value is None else str(value)


def finish(result: Mapping[str, object], path: Path | None) -> None:
    """Write the result as JSON to `path`, if given, and print it as the last line of the output."""
    if path:
        write(result, path)
    print(json.dumps(result))


def write(result: Mapping[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
