"""What a family's package says about itself, as plain data: to name a family imports nothing that computes."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Reference(NamedTuple):
    """Something in a module that is imported only when it is used."""

    module: str
    name: str

    def load(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


class NamedClass(NamedTuple):
    """The class that a model directory names, and the file that names it."""

    file: Path
    class_name: str


class Layout(NamedTuple):
    """A layout of model directories.

    `mark` describes the file by which it is recognised. `named_class` refers to a function `(directory) -> NamedClass |
    None`, which returns None where there is no such file and raises WeightsError where it can't be read.
    """

    mark: str
    named_class: Reference


DIFFUSERS = Layout("the model_index.json of a diffusers pipeline", Reference("models.loading", "pipeline_class"))


class Converter(NamedTuple):
    """Makes a model directory of a checkpoint of another layout.

    `format_name` is its name on the command line. `function` refers to a function that fills two empty folders:
    `(source, base, directory, router_folder, max_shard_bytes)`. `needs_base` says whether its checkpoints lack parts
    that the model directory `base` must give; otherwise `base` is None.
    """

    format_name: str
    function: Reference
    needs_base: bool


@dataclass(frozen=True, slots=True)
class FamilyEntry:
    """One line of the table of families.

    `name` stands on cards and in metrics. `family` refers to the subclass of `Family`. It serves the directories of
    `layout` that name one of `class_names`.
    """

    name: str
    family: Reference
    layout: Layout
    class_names: tuple[str, ...]
    converters: tuple[Converter, ...] = ()
