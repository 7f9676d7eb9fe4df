"""Where the models that ship with the packages lie."""

from collections.abc import Collection
from pathlib import Path

from service.errors import BadConfiguration


def _installation() -> Path:
    """The folder that holds the packages and the models that ship with them; else the working directory.

    A checkout has both, and so does the container image. A wheel has the packages alone.
    """
    folder = Path(__file__).resolve().parents[1]
    return folder if (folder / "checkpoints").is_dir() else Path()


INSTALLATION = _installation()


def shipped_remover() -> Path | None:
    folder = INSTALLATION / "checkpoints" / "u2netp"
    return folder if folder.is_dir() else None


def find_model(model: Path, loras: Collection[str] = ()) -> Path:
    """A model directory from its path, or from its name among the installation's checkpoints.

    Names of `loras` may follow, each after a +: these adapters are added to the model's weights. Raises
    BadConfiguration if there is no such directory or adapter.
    """
    places = dict.fromkeys((model, INSTALLATION / "checkpoints" / model))  # one, if `model` is absolute
    for directory in places:
        if directory.is_dir():
            return directory
    base, *names = model.name.split("+")
    if names:
        if unknown := [name for name in names if name not in loras]:
            there_are = ", ".join(loras) or "none"
            raise BadConfiguration(f"'{model}' names no adapter '{unknown[0]}'; loras has: {there_are}")
        return find_model(model.with_name(base)).with_name(model.name)
    raise BadConfiguration("there is no model directory " + " or ".join(f"'{place}'" for place in places))
