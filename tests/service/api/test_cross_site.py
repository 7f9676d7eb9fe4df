from collections.abc import Callable

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import ValidationError

from service.api.cross_site import AllowedHosts
from service.errors import HostNotAllowed
from service.keys import Scope, new_key
from service.settings import Settings

PATH = "/v1/images/generations"
LOOPBACK = ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.8.9.1", "[::1]:80", "app.localhost", "localhost."]
LOCAL = ["api:8000", "192.168.1.5:8000", "[fe80::1]"]
PUBLIC = ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"]
BROKEN = ["", ":80", "[::1", "a b.example", "."]
KEYS = f"[{new_key('a', [Scope.ADMIN])[1].model_dump_json()}]"


def allowed(settings: Settings) -> list[str]:
    hosts = AllowedHosts(settings)
    names = []
    for name in (*LOOPBACK, *LOCAL, *PUBLIC, *BROKEN):
        try:
            hosts.check(name)
        except HostNotAllowed:
            continue
        names.append(name)
    return names


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_local_server_answers_to_loopback_names(host: str) -> None:
    assert allowed(Settings(host=host, allowed_hosts=())) == LOOPBACK


def test_server_on_a_network_answers_to_names_that_no_page_can_have() -> None:
    assert allowed(Settings(host="0.0.0.0", allowed_hosts=())) == LOOPBACK + LOCAL


def test_server_with_keys_answers_to_all_names_unless_they_are_configured() -> None:
    everything = LOOPBACK + LOCAL + PUBLIC + BROKEN
    assert allowed(Settings(api_keys=KEYS, allowed_hosts=())) == everything
    assert allowed(Settings(allowed_hosts=("*",))) == everything
    assert allowed(Settings(api_keys=KEYS, allowed_hosts=("Evil.example",))) == LOOPBACK + PUBLIC[:2]


def test_public_url_is_a_name_of_the_server() -> None:
    assert allowed(Settings(allowed_hosts=(), public_url="https://evil.example/images")) == LOOPBACK + PUBLIC[:2]


def test_other_hosts_are_refused_with_their_name(
    build_small_app: Callable[[Settings], FastAPI], rejections: list[str]
) -> None:
    with TestClient(build_small_app(Settings(allowed_hosts=()))) as client:
        for method, path in (("GET", "/healthz"), ("POST", PATH), ("GET", "/nowhere")):
            response = client.request(method, path, headers={"Host": "evil.example"})
            assert response.status_code == 403
            assert response.json()["error"]["code"] == "host_not_allowed"
            assert "'evil.example'" in response.json()["error"]["message"]
            assert response.headers["connection"] == "close"
    assert rejections == ["host_not_allowed"] * 3


FORM = {"Content-Type": "text/plain"}


@pytest.mark.parametrize(
    ("headers", "is_allowed"),
    [
        ({}, True),
        ({"Origin": "http://testserver"}, True),
        ({"Origin": "https://testserver:443"}, True),
        ({"Origin": "http://testserver", "Sec-Fetch-Site": "same-origin"}, True),
        ({"Origin": "https://images.example", "Sec-Fetch-Site": "same-origin"}, True),  # behind a proxy
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "http://testserver:3000"}, False),
        ({"Origin": "http://testserver:3000", "Sec-Fetch-Site": "same-site"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://["}, False),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Origin": "https://pictures.example", "Sec-Fetch-Site": "cross-site"}, True),  # in cors_origins
        ({"Origin": "https://public.example", "Sec-Fetch-Site": "cross-site"}, True),  # in public_url
    ],
    ids=str,
)
def test_pages_of_other_sites_may_not_call(
    headers: dict[str, str], is_allowed: bool, build_small_app: Callable[[Settings], FastAPI]
) -> None:
    settings = Settings(cors_origins=("https://pictures.example",), public_url="https://public.example/a")
    with TestClient(build_small_app(settings)) as client:
        answers = (
            client.post(PATH, json={"prompt": "a"}, headers=headers),
            client.delete("/v1/jobs/a", headers=headers),
        )
        statuses = [answer.status_code for answer in answers]
        assert statuses == ([200, 405] if is_allowed else [403, 403])
        assert is_allowed or answers[0].json()["error"]["code"] == "cross_site_call"
        assert client.get("/page", headers=headers).status_code == 200  # following a link is harmless


def test_all_origins_may_call_if_that_is_configured(build_small_app: Callable[[Settings], FastAPI]) -> None:
    with TestClient(build_small_app(Settings(cors_origins=("*",)))) as client:
        response = client.post(PATH, json={"prompt": "a"}, headers={"Origin": "https://evil.example"})
        assert response.status_code == 200


def test_proxies_are_addresses_or_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_TRUSTED_PROXIES", "10.0.0.0/8, ::1")
    assert Settings().trusted_proxies == ("10.0.0.0/8", "::1")
    for wrong in ("proxy", "10.0.0.1/8", "*"):
        with pytest.raises(ValidationError, match="trusted_proxies"):
            Settings(trusted_proxies=(wrong,))
