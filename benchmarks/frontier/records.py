"""Measured figures, one JSON object per line, so that an interrupted run goes on where it stopped."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Key = Mapping[str, str | float | None]
"""What a figure was measured on and how: kind, model, weights, contender, setting, sizes."""


class Records:
    """The lines of a file. A line has its key and its figures; of lines with one key the last counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._figures: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                self._figures[_text(entry["key"])] = entry["figures"]

    def get(self, key: Key) -> dict[str, Any] | None:
        return self._figures.get(_text(key))

    def add(self, key: Key, figures: dict[str, Any]) -> None:
        """Keep the figures and write them to the file at once."""
        self._figures[_text(key)] = figures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "figures": figures}) + "\n")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._figures.values())


def hash_of(*folders: Path) -> str:
    """A short hash of the names and contents of the weights and settings in these folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".safetensors", ".json", ".yaml"):
                digest.update(str(path.relative_to(folder)).encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _text(key: Key) -> str:
    return json.dumps(key, sort_keys=True)
