"""Checkpoints of other layouts become a model directory and its router folder. Converters are imported when used."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from models.errors import InvalidRequest

CONVERTERS: Mapping[str, tuple[str, str]] = {
    # format: (module, function)
    "elastic-dit": ("models.families.qwen_image.conversion", "convert_elastic_dit"),
}
"""A converter fills two empty folders: `(source, base, directory, router_folder, max_shard_bytes)`."""


def convert(
    format_name: str, source: Path, base: Path, out: Path, *, router_weights: Path, max_shard_bytes: int
) -> Path:
    """Import `source`, a checkpoint of a format in CONVERTERS, as the model directory `out`.

    What the checkpoint lacks is taken over from the pipeline directory `base`. Files of weights have at most
    `max_shard_bytes`, or one tensor. Returns the router folder, `router_weights/<name of out>`. Writes both folders or,
    if anything fails, neither. Raises InvalidRequest if one of them is there already, WeightsError if the checkpoint is
    not what it should be.
    """
    if format_name not in CONVERTERS:
        raise InvalidRequest(f"there is no format '{format_name}'; try {', '.join(CONVERTERS)}", "format")
    routers = router_weights / out.name
    for path in (out, routers):
        if path.exists():
            raise InvalidRequest(f"{path} is there already, and nothing is overwritten; try another --out", "out")
        path.parent.mkdir(parents=True, exist_ok=True)
    module, function = CONVERTERS[format_name]
    converter = getattr(importlib.import_module(module), function)
    with (
        TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside_out,
        TemporaryDirectory(dir=routers.parent, prefix=f".{out.name}-") as beside_routers,
    ):
        finished, finished_routers = Path(beside_out) / out.name, Path(beside_routers) / out.name
        finished.mkdir()
        finished_routers.mkdir()
        converter(source, base, finished, finished_routers, max_shard_bytes)
        finished_routers.rename(routers)
        try:
            finished.rename(out)
        except OSError:
            routers.rename(finished_routers)
            raise
    return routers
