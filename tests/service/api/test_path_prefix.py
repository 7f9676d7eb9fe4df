"""The real application below a path, behind a real proxy and without one."""

import json
import re
import socket
from collections.abc import Callable, Iterator
from urllib.parse import urljoin

import httpx2
import pytest
from pydantic import ValidationError

from service.app import create_app
from service.errors import BadConfiguration
from service.running.dispatcher import Dispatcher
from service.settings import Settings
from tests.fixtures.reverse_proxy import ReverseProxy

PREFIX = "/tools/images-1"
BODY = {"prompt": "a", "response_format": "url"}


@pytest.fixture(params=["strips", "passes", "direct"])
def base(request: pytest.FixtureRequest, door: socket.socket, serve: Callable[[Settings], None]) -> Iterator[str]:
    """The address of a server below PREFIX: behind a proxy that removes it or does not, or the server's own."""
    address = f"127.0.0.1:{door.getsockname()[1]}"
    with ReverseProxy(PREFIX, strips=request.param == "strips", upstream=address) as proxy:
        url = f"http://{address}{PREFIX}" if request.param == "direct" else proxy.url
        serve(Settings(public_url=f"{url}/", max_body_bytes=2000, grace_s=0))
        yield url


def test_links_locations_and_events_are_below_the_path(base: str) -> None:
    with httpx2.Client(timeout=60) as client:
        # A result's URL and a job's links
        result = client.post(f"{base}/v1/images", json=BODY).json()
        url = result["data"][0]["url"]
        assert url.startswith(f"{base}/v1/jobs/")
        assert client.get(url).headers["content-type"] == "image/png"
        accepted = client.post(f"{base}/v1/images", json=BODY, headers={"Prefer": "respond-async"})
        location = urljoin(f"{base}/v1/images", accepted.headers["location"])
        assert location == accepted.json()["links"]["self"] == f"{base}/v1/jobs/{accepted.json()['id']}"
        assert client.get(location).json()["id"] == accepted.json()["id"]
        events = client.get(accepted.json()["links"]["events"])
        assert "event: image_generation.completed" in events.text
        assert events.headers["cache-control"] == "no-store"
        # What the middlewares decide by the route
        assert client.post(f"{base}/v1/images", json={"prompt": "a" * 3000}).status_code == 413
        assert client.get(f"{base}/v1/nowhere").json()["error"]["code"] == "not_found"
        assert client.get(f"{base}/healthz").status_code == 200


@pytest.mark.parametrize("end", ["", "/"])
def test_front_page_and_documentation_find_their_files(base: str, end: str) -> None:
    with httpx2.Client(timeout=60) as client:
        for page in (f"{base}{end}", f"{base}/docs"):
            text = client.get(page).text
            links = re.findall(r"(?:src|href)=\"([^\"]+)\"", text) + re.findall(r"url: '([^']+)'", text)
            links = [link for link in links if not link.startswith("data:")]
            assert len(links) >= 3
            for link in links:
                target = urljoin(page, link)
                assert target.startswith(f"{base}/")
                assert client.get(target).status_code == 200
        document = json.loads(client.get(f"{base}/openapi.json").text)
        assert document["servers"] == [{"url": PREFIX}]


def test_server_below_a_path_answers_its_own_network_without_it(
    make_dispatcher: Callable[[Settings], Dispatcher], start_client: Callable[..., httpx2.Client]
) -> None:
    client = start_client(Settings(public_url=f"https://pictures.example{PREFIX}"))
    for path in ("/healthz", f"{PREFIX}/healthz", "/", PREFIX, f"{PREFIX}/"):
        assert client.get(path).status_code == 200
    assert client.get(f"{PREFIX}x/healthz").status_code == 404


@pytest.mark.parametrize("path", ["/v1", "/v1/images", "/docs"])
def test_path_that_the_api_has_too_is_refused(path: str, make_dispatcher: Callable[[Settings], Dispatcher]) -> None:
    settings = Settings(public_url=f"https://pictures.example{path}")
    dispatcher = make_dispatcher(settings)
    with pytest.raises(BadConfiguration, match=f"public_url ends in {path}"):
        create_app(settings, dispatcher)
    assert dispatcher.worker.stop(20)


@pytest.mark.parametrize(
    "url",
    ["pictures.example/a", "ftp://a.example", "https://a.example/b?c", "https://a.example/b c", "https://u@a.example"],
)
def test_public_url_is_an_address(url: str) -> None:
    with pytest.raises(ValidationError, match="public_url"):
        Settings(public_url=url)
