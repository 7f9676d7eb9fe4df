"""Checkpoints of other layouts become a model directory and its router folder. Converters are imported when used."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from models.errors import InvalidRequest


class Converter(NamedTuple):
    """A function that fills two empty folders: `(source, base, directory, router_folder, max_shard_bytes)`.

    `needs_base` says whether its checkpoints lack parts that a pipeline directory must give; else `base` is None.
    """

    module: str
    function: str
    needs_base: bool

    def load(self) -> Any:
        return getattr(importlib.import_module(self.module), self.function)


CONVERTERS: Mapping[str, Converter] = {
    "elastic-dit": Converter("models.families.qwen_image.conversion", "convert_elastic_dit", needs_base=True),
    "hunyuan3d": Converter("models.families.hunyuan3d.conversion", "convert_hunyuan3d", needs_base=False),
}
"""By format."""


def convert(
    format_name: str, source: Path, base: Path | None, out: Path, *, router_weights: Path, max_shard_bytes: int
) -> Path:
    """Import `source`, a checkpoint of a format in CONVERTERS, as the model directory `out`.

    What the checkpoint lacks, in formats that lack something, is taken over from the pipeline directory `base`. Files
    of weights that can be split have at most `max_shard_bytes`, or one tensor. Returns the router folder,
    `router_weights/<name of out>`. Writes both folders or, if anything fails, neither. Raises InvalidRequest if one of
    them is there already, WeightsError if the checkpoint is not what it should be.
    """
    if format_name not in CONVERTERS:
        raise InvalidRequest(f"there is no format '{format_name}'; try {', '.join(CONVERTERS)}", "format")
    converter = CONVERTERS[format_name]
    if converter.needs_base and base is None:
        raise InvalidRequest(f"format {format_name} needs --base, a model directory with what it lacks", "base")
    if not converter.needs_base and base is not None:
        raise InvalidRequest(f"format {format_name} takes no --base, but got {base}: it lacks nothing", "base")
    routers = router_weights / out.name
    for path in (out, routers):
        if path.exists():
            raise InvalidRequest(f"{path} is there already, and nothing is overwritten; try another --out", "out")
        path.parent.mkdir(parents=True, exist_ok=True)
    fill = converter.load()
    with (
        TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside_out,
        TemporaryDirectory(dir=routers.parent, prefix=f".{out.name}-") as beside_routers,
    ):
        finished, finished_routers = Path(beside_out) / out.name, Path(beside_routers) / out.name
        finished.mkdir()
        finished_routers.mkdir()
        fill(source, base, finished, finished_routers, max_shard_bytes)
        finished_routers.rename(routers)
        try:
            finished.rename(out)
        except OSError:
            routers.rename(finished_routers)
            raise
    return routers
