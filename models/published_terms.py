"""The terms of use that published repositories name."""

from pathlib import Path

import yaml
from huggingface_hub.repocard import metadata_load


def published_terms(directory: Path) -> str | None:
    """The licence in the front matter of a published repository's README.md; None if it names none.

    `directory` is the repository or, if it has no README.md itself, a folder of one.
    """
    files = (place / "README.md" for place in (directory, directory.parent))
    file = next((file for file in files if file.exists()), None)
    try:
        terms = metadata_load(file) if file else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    terms = terms or {}
    name = terms.get("license_name") or terms.get("license")
    return str(name) if name else None
