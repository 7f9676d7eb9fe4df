"""Files that state the same fact agree."""

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT, CLIENT = (
    tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"] for folder in (".", "client")
)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines)}


def test_constraints_are_exact_pins_without_addresses_or_paths() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line


def test_clients_that_are_tried_are_pinned_without_addresses() -> None:
    folder = ROOT / "tests" / "clients"
    for line in (folder / "python" / "requirements.txt").read_text().splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line
    packages = json.loads((folder / "node" / "package-lock.json").read_text())["packages"]
    installed = {name: package for name, package in packages.items() if name}
    assert [name for name, package in installed.items() if "resolved" in package] == []
    assert all(package["integrity"] for package in installed.values())
    wanted = json.loads((folder / "node" / "package.json").read_text())["dependencies"]
    assert {name: installed[f"node_modules/{name}"]["version"] for name in wanted} == wanted


def test_constraints_pin_every_direct_dependency_to_a_version_it_allows() -> None:
    extras = [entry for extra in PROJECT["optional-dependencies"].values() for entry in extra]
    requirements = [Requirement(entry) for entry in [*PROJECT["dependencies"], *extras, *CLIENT["dependencies"]]]
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        is_ours = name in (PROJECT["name"], CLIENT["name"])
        assert is_ours or pins()[name] in requirement.specifier, str(requirement)


def test_changelog_opens_with_the_version_of_the_package() -> None:
    released = re.findall(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == PROJECT["version"] == version("elastic-dit-serve")


def test_client_needs_httpx2_alone_and_has_the_licence_and_python_of_the_server() -> None:
    assert [Requirement(entry).name for entry in CLIENT["dependencies"]] == ["httpx2"]
    assert set(CLIENT["dependencies"]) <= set(PROJECT["dependencies"])
    for field in ("license", "requires-python"):
        assert CLIENT[field] == PROJECT[field]
    assert (ROOT / "client" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
