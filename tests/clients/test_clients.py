"""What works with the clients that people have: each of them calls a real server, behind a proxy and with API keys."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import sync_playwright

from tests.clients.conftest import FOLDER, Reached
from tests.clients.python.checks import check_only_left_half_changed, check_transparent, image_behind, image_of_base64

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
NODE = FOLDER / "node"
LIMIT_S = 300
CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

Noted = Callable[[str, dict[str, Any]], None]


@pytest.fixture
def noted(record_property: Callable[[str, object], None]) -> Noted:
    """Prints a line for a feature of a client, and keeps it for the table."""

    def note(client: str, line: dict[str, Any]) -> None:
        record_property("checked", (client, line["feature"], line["problem"]))
        print(f"{client:28} {line['feature']:16} {line['problem'] or 'pass'}", flush=True)

    return note


def check_script(client: str, command: list[str], reached: Reached, noted: Noted) -> None:
    """Run the script of a client, which prints a JSON line for each feature."""
    environment = os.environ | reached.environment
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = []
        for text in process.stdout:
            lines.append(json.loads(text))
            noted(client, lines[-1])
        status = process.wait(LIMIT_S)
    check_lines(lines)
    assert status == 0, f"it ended with status {status}"


def check_lines(lines: list[dict[str, Any]]) -> None:
    assert lines, "no feature was checked"
    assert [line for line in lines if line["problem"]] == []


def test_openai_for_python(reached: Reached, noted: Noted) -> None:
    python = PYTHON if PYTHON.exists() else Path(sys.executable)
    check_script("openai (Python)", [str(python), "-m", "tests.clients.python.openai_sdk"], reached, noted)


@pytest.mark.parametrize(
    ("client", "script"), [("LiteLLM", "litellm_sdk"), ("LangChain (Python)", "langchain_wrapper")]
)
def test_other_clients_for_python(client: str, script: str, reached: Reached, noted: Noted) -> None:
    if not PYTHON.exists():
        pytest.skip("there is no .venv-clients; make test-clients makes it")
    check_script(client, [str(PYTHON), "-m", f"tests.clients.python.{script}"], reached, noted)


@pytest.mark.parametrize(
    ("client", "script"),
    [
        ("openai (node)", "openai_sdk.mjs"),
        ("AI SDK, openai-compatible", "ai_sdk.mjs openai-compatible"),
        ("AI SDK, openai", "ai_sdk.mjs openai"),
        ("LangChain (JavaScript)", "langchain.mjs"),
        ("eventsource-client", "event_source.mjs"),
        ("fetch, glTF validator", "meshes.mjs"),
    ],
)
def test_clients_for_node(client: str, script: str, node_modules: Path, reached: Reached, noted: Noted) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    name, *arguments = script.split()
    check_script(client, [node, str(NODE / name), *arguments], reached, noted)


@pytest.fixture
def node_modules() -> Path:
    folder = NODE / "node_modules"
    if not folder.is_dir():
        pytest.skip("the packages for node are not installed; make test-clients installs them")
    return folder


def test_openai_in_chromium(node_modules: Path, reached: Reached, noted: Noted) -> None:
    """A page of another origin that the server allows loads OpenAI's SDK and calls the server."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    lines: list[dict[str, Any]] = []

    def report(line: dict[str, Any]) -> None:
        lines.append(line)
        noted("openai (Chromium)", line)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        page = browser.new_page()
        page.expose_function("report", report)
        page.goto(f"{reached.page_url}/browser.html")
        files = {name: list((reached.pictures / f"{name}.png").read_bytes()) for name in ("picture", "mask")}
        page.evaluate(
            "async (target) => (await import('/browser.mjs')).run(target)",
            {"baseURL": reached.base_url, "apiKey": reached.api_key, **files},
        )
        browser.close()
    check_lines(lines)


RECORDED = [json.loads(path.read_text()) for path in sorted((FOLDER / "recorded").glob("*.json"))]


@pytest.mark.parametrize(
    ("client", "request_"),
    [
        pytest.param(recorded["client"], request, id=f"{recorded['client']}-{request['feature']}")
        for recorded in RECORDED
        for request in recorded["requests"]
    ],
)
def test_recorded_request(client: str, request_: dict[str, Any], reached: Reached, noted: Noted) -> None:
    """Requests of clients that cannot be run here, as their sources write them."""
    problem = None
    try:
        check_recorded(request_, reached)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        raise
    finally:
        noted(client, {"feature": request_["feature"], "problem": problem})


def check_recorded(request: dict[str, Any], reached: Reached) -> None:
    parts = [
        (part["name"], (part["file"], (reached.pictures / part["file"]).read_bytes(), part["content_type"]))
        if "file" in part
        else (part["name"], (None, part["value"], part.get("content_type")))
        for part in request.get("parts", [])
    ]
    answer = httpx2.post(
        reached.base_url + request["path"],
        headers={"Authorization": f"Bearer {reached.api_key}"},
        json=request.get("json"),
        files=parts or None,
        timeout=LIMIT_S,
    )
    assert answer.status_code == 200, answer.text[:500]
    reads, body = request["reads"], answer.json()
    images = [
        (image_behind if reads["field"] == "url" else image_of_base64)(item.get(reads["field"]))
        for item in body["data"]
    ]
    assert [image.size for image in images] == [tuple(reads["size"])] * reads.get("number", 1)
    assert {image.format for image in images} == {reads.get("format", "PNG")}
    if reads.get("usage"):
        assert body["usage"]["total_tokens"] > 0
    if reads.get("is_transparent"):
        check_transparent(images[0])
    if "changed" in reads:
        check_only_left_half_changed(images[0], reached.pictures / "picture.png")
