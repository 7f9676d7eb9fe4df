"""A server behind a proxy, as clients reach it, and the table of what works with each client."""

import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image, ImageDraw

from examples.server_process import ElasticDit
from service.keys import Scope, new_key
from tests.clients.proxy import prefix_proxy

FOLDER = Path(__file__).parent
ALIASES = "gpt-image-*=tiny-flux,dall-e-*=tiny-qwen-image"
PREFIX = "/pictures"


@dataclass(frozen=True)
class Reached:
    """How clients reach the server. `page_url` is of a site with another origin whose pages may call it."""

    base_url: str
    api_key: str
    pictures: Path
    page_url: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "CLIENTS_BASE_URL": self.base_url,
            "CLIENTS_API_KEY": self.api_key,
            "CLIENTS_PICTURES": str(self.pictures),
        }


@pytest.fixture(scope="session")
def reached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reached]:
    folder = tmp_path_factory.mktemp("clients")
    save_pictures(folder)
    secret, entry = new_key("clients", [Scope.GENERATE])
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}{PREFIX}"
    site = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(FOLDER / "node")))
    page_url = f"http://127.0.0.1:{site.server_port}"
    settings = {
        "ELASTIC_MODEL_ALIASES": ALIASES,
        "ELASTIC_API_KEYS": f"[{entry.model_dump_json()}]",
        "ELASTIC_CORS_ORIGINS": page_url,
        "ELASTIC_LINK_SECRET": "a secret of the tests, long enough to be one",
        "ELASTIC_PUBLIC_URL": address,
        "ELASTIC_TRUSTED_PROXIES": "127.0.0.1",
    }
    with ElasticDit("serve", folder / "log", **settings) as server, site:
        Thread(target=site.serve_forever).start()
        with prefix_proxy(listener, PREFIX, server.wait_until_ready()):
            yield Reached(f"{address}/v1", secret, folder, page_url)
        site.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing of each file."""


def save_pictures(folder: Path) -> None:
    """picture.png, a red circle; and mask.png, whose left half is transparent: to be edited."""
    picture = Image.new("RGB", (128, 128), (235, 235, 235))
    ImageDraw.Draw(picture).ellipse((24, 24, 104, 104), fill=(220, 40, 40))
    picture.save(folder / "picture.png")
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 64, 128))
    mask.save(folder / "mask.png")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of clients and features, in the order in which they were tried."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    rows: dict[str, dict[str, str]] = {}
    for report in sorted(reports, key=lambda report: report.start):
        for name, value in report.user_properties:
            if name == "checked":
                client, feature, problem = value
                rows.setdefault(client, {})[feature] = "FAIL" if problem else "pass"
    if not rows:
        return
    features = list(dict.fromkeys(feature for row in rows.values() for feature in row))
    width = max(map(len, rows))
    terminalreporter.section("clients and features")
    terminalreporter.write_line("  ".join([" " * width, *features]))
    for client, row in rows.items():
        cells = [row.get(feature, "").center(len(feature)) for feature in features]
        terminalreporter.write_line("  ".join([client.ljust(width), *cells]).rstrip())
