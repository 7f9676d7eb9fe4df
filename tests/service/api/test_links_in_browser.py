"""Signed links on a page of another origin, in Chromium: as an image, and as a stream of events."""

import shutil
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Page, sync_playwright
from pydantic import SecretStr

from service.keys import Scope, new_key
from service.settings import Settings

pytestmark = pytest.mark.server

LISTEN = """([url, last]) => new Promise((resolve) => {
  const names = [];
  const source = new EventSource(url);
  source.onerror = () => resolve([...names, "closed"]);
  for (const name of ["job.queued", "job.started", last]) {
    source.addEventListener(name, (event) => {
      names.push(name);
      if (name === last) { source.close(); resolve(names); }
    });
  }
})"""
SHOW = """(url) => new Promise((resolve) => {
  const image = new Image();
  image.onload = () => resolve(image.naturalWidth);
  image.onerror = () => resolve(0);
  image.src = url;
})"""


class _EmptyPage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response_only(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of an origin of its own."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    with ThreadingHTTPServer(("127.0.0.1", 0), _EmptyPage) as pages, sync_playwright() as playwright:
        thread = Thread(target=pages.serve_forever)
        thread.start()
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{pages.server_port}/")
        yield page
        browser.close()
        pages.shutdown()
        thread.join(20)


def test_page_of_another_origin_shows_images_and_events(
    page: Page, door: socket.socket, serve: Callable[[Settings], None]
) -> None:
    secret, entry = new_key("a", [Scope.GENERATE])
    origin: str = page.evaluate("location.origin")
    settings = Settings(
        api_keys=f"[{entry.model_dump_json()}]", link_secret=SecretStr("x" * 32), cors_origins=(origin,), grace_s=0
    )
    serve(settings)
    base = "http://{}:{}".format(*door.getsockname())
    headers = {"Authorization": f"Bearer {secret}"}
    with httpx2.Client(base_url=base, headers=headers, timeout=60) as client:
        made = client.post("/v1/images", json={"prompt": "a", "response_format": "url"}).json()
        links: dict[str, Any] = client.get(f"/v1/jobs/{made['id']}").json()["links"]
    last = "image_generation.completed"
    assert page.evaluate(SHOW, made["data"][0]["url"]) == page.evaluate(SHOW, links["content"][0]) == 64
    assert page.evaluate(LISTEN, [links["events"], last]) == ["job.queued", "job.started", last]
    # Without its signature neither opens
    assert page.evaluate(SHOW, made["data"][0]["url"].partition("&")[0]) == 0
    assert page.evaluate(LISTEN, [links["events"].partition("?")[0], last]) == ["closed"]
