"""Signed links, which open one artifact or one job's events without a key."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr, ValidationError

from service.app import build_dispatcher, create_app
from service.jobs.store import JobStore
from service.keys import Scope, new_key
from service.logging import JsonFormatter
from service.settings import Settings

SECRET = SecretStr("0123456789abcdef0123456789abcdef")
TTL_S = 600.0
MINE, MY_ENTRY = new_key("mine", [Scope.GENERATE])
OTHERS, OTHERS_ENTRY = new_key("others", [Scope.GENERATE])
ADMIN, ADMIN_ENTRY = new_key("admin", [Scope.ADMIN])
PROMETHEUS, PROMETHEUS_ENTRY = new_key("prometheus", [Scope.METRICS])
ENTRIES = (MY_ENTRY, OTHERS_ENTRY, ADMIN_ENTRY, PROMETHEUS_ENTRY)

Start = Callable[..., TestClient]


def with_key(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def keys(*entries: Any) -> str:
    return json.dumps([entry.model_dump(mode="json") for entry in entries])


@pytest.fixture
def now() -> list[float]:
    """The time by the store's clock."""
    return [1_700_000_000.0]


@pytest.fixture
def start(engine: Any, now: list[float], monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a server with keys that signs links. Servers share their jobs, as with Redis."""
    store: list[JobStore] = []
    with ExitStack() as stack:

        def start(**fields: Any) -> TestClient:
            settings = Settings(**{"api_keys": keys(*ENTRIES), "link_secret": SECRET, "link_ttl_s": TTL_S, **fields})
            monkeypatch.setattr("service.app.build_store", lambda *_: store[0]) if store else None
            dispatcher = build_dispatcher(settings, lambda: engine, clock=lambda: now[0])
            store.append(dispatcher.store)
            dispatcher.worker.start()
            return stack.enter_context(TestClient(create_app(settings, dispatcher)))

        yield start


def made(client: TestClient, **fields: Any) -> tuple[str, list[str]]:
    """The links to the events and the images of a new job of the key MINE."""
    result = client.post("/v1/images", json={"prompt": "a", "n": 2, **fields}, headers=with_key(MINE)).json()
    job = client.get(f"/v1/jobs/{result['id']}", headers=with_key(MINE)).json()
    return job["links"]["events"], job["links"]["content"]


def error_of(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_links_of_every_answer_open_without_a_key(start: Start) -> None:
    client = start()
    body = {"prompt": "a", "response_format": "url"}
    result = client.post("/v1/images", json=body, headers=with_key(MINE)).json()
    stream = client.post("/v1/images", json={**body, "stream": True}, headers=with_key(MINE)).text
    completed = json.loads(next(line[6:] for line in reversed(stream.splitlines()) if line.startswith("data: ")))
    headers = with_key(MINE) | {"Prefer": "respond-async"}
    accepted = client.post("/v1/images", json=body, headers=headers).json()
    events, content = made(client)
    for url in (result["data"][0]["url"], completed["url"], accepted["links"]["events"], events, *content):
        answer = client.get(url)
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-store"
        assert client.head(url).status_code == 200
    assert "image_generation.completed" in client.get(accepted["links"]["events"]).text
    assert error_of(client.get(accepted["links"]["self"])) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda url: url.replace("index=0", "index=1"), "invalid_link"),
        (lambda url: url.replace("index=0&", ""), "invalid_link"),
        (lambda url: url.replace("/content?index=0&", "/events?"), "invalid_link"),
        (lambda url: url.replace("expires=1", "expires=2"), "invalid_link"),
        (lambda url: url.replace("expires=", "expires=x"), "invalid_link"),
        (lambda url: url.replace("expires=", "expired="), "invalid_link"),
        (lambda url: url.replace("job_", "job_0"), "invalid_link"),
        (lambda url: url + "A", "invalid_link"),
        (lambda url: url[:-1] + "%C3%A4", "invalid_link"),
        (lambda url: url.partition("&signature")[0] + "&signature=", "invalid_link"),
        (lambda url: url + "&more=1", "invalid_link"),
        (lambda url: url.partition("&signature")[0], "invalid_api_key"),
        (lambda url: url.replace("/content", ""), "invalid_api_key"),  # which no link shows
    ],
)
def test_signature_is_for_one_address_alone(change: Callable[[str], str], code: str, start: Start) -> None:
    client = start()
    _, (url, _) = made(client)
    status = 401 if code == "invalid_api_key" else 403
    assert error_of(client.get(change(url))) == (status, code)
    assert client.get(url).status_code == 200


def test_link_deletes_nothing(start: Start) -> None:
    client = start()
    _, (url, _) = made(client)
    job = url.replace("/content", "")
    assert error_of(client.delete(job)) == (401, "invalid_api_key")
    assert error_of(client.delete(url)) == (405, "method_not_allowed")


def test_link_expires(start: Start, now: list[float]) -> None:
    client = start()
    events, content = made(client)
    now[0] += TTL_S - 1
    assert client.get(content[0]).status_code == client.get(events).status_code == 200
    now[0] += 1
    for url in (events, *content):
        response = client.get(url)
        assert error_of(response) == (403, "link_expired")
        assert "GET /v1/jobs/{id} with a key" in response.json()["error"]["message"]
        assert client.get(url, headers=with_key(MINE)).status_code == 200  # the key is enough
        assert error_of(client.get(url, headers=with_key(OTHERS))) == (404, "job_not_found")


@pytest.mark.parametrize(
    "secret", ["wrong", OTHERS, PROMETHEUS, ADMIN, MINE], ids=["wrong", "others", "prometheus", "admin", "mine"]
)
def test_link_is_enough_whatever_the_key(secret: str, start: Start) -> None:
    client = start()
    events, content = made(client)
    for url in (events, *content):
        assert client.get(url, headers=with_key(secret)).status_code == 200


def test_link_goes_with_its_key(start: Start) -> None:
    _, content = made(start())
    new_secret_of_key = MY_ENTRY.model_copy(update={"sha256": "0" * 64})
    assert start(api_keys=keys(new_secret_of_key)).get(content[0]).status_code == 200
    assert error_of(start(api_keys=keys(OTHERS_ENTRY)).get(content[0])) == (403, "invalid_link")


def test_servers_must_share_the_secret(start: Start) -> None:
    _, content = made(start())
    assert start().get(content[0]).status_code == 200
    assert error_of(start(link_secret=SecretStr("x" * 32)).get(content[0])) == (403, "invalid_link")


def test_links_work_below_a_path(start: Start) -> None:
    events, content = made(start(public_url="http://testserver/images"))
    for url in (events, *content):
        assert url.startswith("http://testserver/images/v1/jobs/")
        for own in (url, url.replace("/images", "")):  # as it is, and after a proxy that removes the path
            assert start(public_url="http://testserver/images").get(own).status_code == 200


@pytest.mark.parametrize("fields", [{"link_secret": None}, {"api_keys": None}])
def test_links_are_not_signed_without_a_secret_or_without_keys(fields: dict[str, Any], start: Start) -> None:
    client = start(**fields)
    events, content = made(client)
    for url in (events, *content):
        assert not dict(parse_qsl(urlsplit(url).query)).keys() - {"index"}
        signed = url + ("&" if "?" in url else "?") + "expires=1&signature=x"  # means nothing
        assert client.get(signed).status_code == (200 if "api_keys" in fields else 401)


def test_signatures_are_not_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = start()
    events, content = made(client)
    for url in (events, *content):
        client.get(url)
        client.get(url + "x")
    ours = [JsonFormatter().format(record) for record in caplog.records if not record.name.startswith("http")]
    metrics = client.get("/metrics", headers=with_key(PROMETHEUS)).text
    assert "/v1/jobs/{job_id}/content" in str(ours)
    for url in (events, *content):
        signature = dict(parse_qsl(urlsplit(url).query))["signature"]
        assert len(signature) == 43
        assert signature not in str(ours)
        assert signature not in metrics


def test_document_says_that_a_link_is_an_alternative_to_a_key(start: Start) -> None:
    document = cast(dict[str, Any], start().get("/openapi.json").json())
    schemes = document["components"]["securitySchemes"]
    assert schemes["SignedLink"]["in"] == "query"
    for path in ("content", "events"):
        operation = document["paths"][f"/v1/jobs/{{job_id}}/{path}"]["get"]
        assert operation["security"] == [{"ApiKey": []}, {"SignedLink": []}]
        assert "invalid_link, link_expired" in operation["responses"]["403"]["description"]
        assert "expires" in [parameter["name"] for parameter in operation["parameters"]]
    assert document["paths"]["/v1/jobs/{job_id}"]["delete"]["security"] == [{"ApiKey": []}]


def test_short_secret_is_refused_without_showing_it() -> None:
    with pytest.raises(ValidationError, match="link_secret") as raised:
        Settings(link_secret=SecretStr("too-short"))
    assert "too-short" not in str(raised.value)
