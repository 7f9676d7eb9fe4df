"""Commands, paths, links and budgets in the README exist and are valid."""

import json
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from service import cli
from service.api.routes_edits import EditRoute
from service.api.routes_meshes import MeshRoute
from service.api.schemas import EditBody, ImageBody, MeshBody
from service.budget import BudgetBody

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODELS_PAGE = (ROOT / "docs/models.md").read_text()


def code_lines(text: str) -> list[str]:
    """Lines of indented code, continuations joined."""
    joined = text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.startswith("    ")]


def paths_of_tree(text: str) -> Iterator[str]:
    """Paths of the file tree. Each level is indented by two more spaces."""
    parents: list[str] = []
    for line in text.split("## What is where\n\n```\n")[1].split("```")[0].splitlines():
        name = line.split()[0]
        level = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:level], name]
        yield "".join(parents)


def test_every_make_command_is_a_target() -> None:
    used = set(re.findall(r"\bmake ([a-z-]+)", " ".join([*code_lines(README), *re.findall(r"`([^`\n]+)`", README)])))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "serve"} <= used <= targets


def test_help_lists_every_make_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    assert phony[1].split() == re.findall(r"^([a-z-]+):.* ## ", makefile, re.MULTILINE)


@pytest.mark.parametrize("line", [line for line in code_lines(README + MODELS_PAGE) if "elastic-dit " in line])
def test_every_command_line_is_valid(line: str) -> None:
    _, command, *arguments = shlex.split(line)
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    group.commands[command].make_context(command, arguments)


@pytest.mark.parametrize("line", [line for line in code_lines(README) if line.startswith("curl ")])
def test_every_curl_sends_a_valid_body(line: str) -> None:
    words = shlex.split(line)
    if "-d" in words:
        ImageBody.model_validate_json(words[words.index("-d") + 1])
        return
    parts = dict(word.split("=", 1) for flag, word in pairwise(words) if flag == "-F")
    is_edit = any(word.endswith("/v1/images/edits") for word in words)
    pictures, picture = (EditRoute.pictures, "image") if is_edit else (MeshRoute.pictures, "input_image")
    image = parts.pop(picture)
    is_made_before = f" -o {image.removeprefix('@')} " in README.split(line.split(" -F ")[0])[0]
    assert is_made_before or (ROOT / image.removeprefix("@")).is_file()
    fields = {name: value if name in pictures.texts else json.loads(value) for name, value in parts.items()}
    (EditBody if is_edit else MeshBody).model_validate({picture: image, **fields})


def test_every_budget_of_the_table_is_valid() -> None:
    forms = re.findall(r"^\| `(\{.*?\})`", README, re.MULTILINE)
    assert len(forms) == 4
    for form in forms:
        BudgetBody.model_validate(json.loads(form))


def test_file_tree_shows_what_exists() -> None:
    paths = list(paths_of_tree(README))
    assert "models/families/flux/" in paths
    assert [path for path in paths if not (ROOT / path).is_dir()] == []


@pytest.mark.parametrize("document", ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))])
def test_every_local_link_leads_somewhere(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in links if not leads_somewhere(ROOT / document, link)] == []


def leads_somewhere(document: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = document.parent / name if name else document
    if not anchor or not target.is_file():
        return target.exists() and not anchor
    headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
    return anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
