"""Reads recordings from the folder that PARITY_DIR names, or else from `data`."""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("PARITY_DIR") or Path(__file__).parent / "data")


class Recording(NamedTuple):
    """`settings` is the .json file, `tensors` are inputs and outputs, `weights` are under their official names."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: dict[str, Tensor]


@cache
def read(name: str) -> Recording:
    tensors = load_file(FOLDER / f"{name}.safetensors")
    weights = {key.removeprefix("w/"): tensors[key] for key in tensors if key.startswith("w/")}
    return Recording(json.loads((FOLDER / f"{name}.json").read_text()), tensors, weights)


@pytest.fixture(scope="session")
def recorded() -> Callable[[str], Recording]:
    """Reads the recording of a name. Skips the test if its files are missing."""

    def recorded(name: str) -> Recording:
        for file in (FOLDER / f"{name}.json", FOLDER / f"{name}.safetensors"):
            if not file.exists():
                pytest.skip(f"there is no {file}")
        return read(name)

    return recorded
