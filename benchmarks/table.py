"""Output of benchmarks: tables for people, one line of JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

TableRow = dict[str, float | str | None]


def show(title: str, rows: Sequence[TableRow]) -> None:
    print(f"\n{title}")
    print("  ".join(f"{key:>14}" for key in rows[0]))
    for row in rows:
        print("  ".join(f"{_cell(value):>14}" for value in row.values()), flush=True)


def _cell(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "-" if value is None else str(value)


def finish(result: Mapping[str, object], path: Path | None) -> None:
    """Write the result as JSON to `path`, if given, and print it as the last line of the output."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
