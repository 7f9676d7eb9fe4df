"""Imports checkpoints of other layouts as a model directory and its router folder. The converters are the families'."""

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from models.errors import InvalidRequest
from models.families import FAMILIES
from models.families.entry import Converter, Reference

REORDER = Converter("reorder", Reference("models.neuron_order", "reorder"), needs_base=False)
"""Its checkpoints are model directories of any family."""


def convert(
    format_name: str, source: Path, base: Path | None, out: Path, *, router_weights: Path, max_shard_bytes: int
) -> Path:
    """Import `source`, a checkpoint of a format that a family converts, as the model directory `out`.

    If the format lacks parts, these come from the model directory `base`. Files of weights that can be split have at
    most `max_shard_bytes`, or one tensor. Returns the router folder, `router_weights/<name of out>`. Writes both
    folders or, on failure, neither. Raises InvalidRequest if one of them exists already, WeightsError if the checkpoint
    is not of this format.
    """
    converters = {converter.format_name: converter for entry in FAMILIES.values() for converter in entry.converters}
    converters[REORDER.format_name] = REORDER
    if format_name not in converters:
        raise InvalidRequest(f"there is no format '{format_name}'; try {', '.join(converters)}", "format")
    converter = converters[format_name]
    if converter.needs_base and base is None:
        raise InvalidRequest(f"format {format_name} needs --base, a model directory with the parts it lacks", "base")
    if not converter.needs_base and base is not None:
        raise InvalidRequest(
            f"format {format_name} takes no --base, but got {base}; its checkpoints are complete", "base"
        )
    routers = router_weights / out.name
    for path in (out, routers):
        if path.exists():
            raise InvalidRequest(f"{path} is there already and is not overwritten; try another --out", "out")
        path.parent.mkdir(parents=True, exist_ok=True)
    fill = converter.function.load()
    if converter is REORDER:
        fill = partial(fill, source_routers=router_weights / source.resolve().name)
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
