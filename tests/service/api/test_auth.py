import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection

import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from service.api.responses import ErrorBody
from service.keys import Scope, new_key
from service.settings import Settings

PATH = "/v1/images/generations"
PROMPT = {"prompt": "a red circle"}


@dataclass(frozen=True)
class Keys:
    """Secrets of keys; `settings` knows them. `metered` has a limit of its own."""

    maker: str
    reader: str
    admin: str
    metered: str
    settings: Settings


@pytest.fixture
def keys() -> Keys:
    secrets, entries = {}, []
    for name, scope in (
        ("maker", Scope.GENERATE),
        ("reader", Scope.METRICS),
        ("admin", Scope.ADMIN),
        ("metered", Scope.GENERATE),
    ):
        secrets[name], entry = new_key(name, [scope])
        entries.append(entry.model_dump() | ({"rate_limit": "1/minute"} if name == "metered" else {}))
    return Keys(**secrets, settings=Settings(api_keys=json.dumps(entries)))


@pytest.fixture
def guarded(keys: Keys, build_small_app: Callable[[Settings], FastAPI]) -> Iterator[TestClient]:
    """A server with keys and a limit of two calls a minute."""
    settings = keys.settings.model_copy(update={"rate_limit": "2/minute"})
    with TestClient(build_small_app(settings), raise_server_exceptions=False) as client:
        yield client


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_key_allows_the_calls_of_its_scope(guarded: TestClient, keys: Keys) -> None:
    for secret, key_id in ((keys.maker, "maker"), (keys.admin, "admin")):
        assert guarded.post(PATH, json=PROMPT, headers=bearer(secret)).status_code == 200
        assert guarded.get("/v1/jobs/a", headers=bearer(secret)).json() == {"id": "a", "key": key_id}
    for secret in (keys.reader, keys.admin):
        assert guarded.get("/metrics", headers=bearer(secret)).status_code == 200


def test_key_without_the_scope_is_forbidden(guarded: TestClient, keys: Keys) -> None:
    answers = (
        guarded.post(PATH, json=PROMPT, headers=bearer(keys.reader)),
        guarded.get("/v1/jobs/a", headers=bearer(keys.reader)),
        guarded.get("/metrics", headers=bearer(keys.maker)),
    )
    for response in answers:
        assert response.status_code == 403
        assert ErrorBody.model_validate(response.json()).error.code == "insufficient_scope"
    assert answers[2].json()["error"]["message"] == "this key is for generate; this call needs metrics"


@pytest.mark.parametrize("headers", [{}, bearer("elastic_wrong"), {"Authorization": "Basic YTpi"}])
def test_missing_and_wrong_keys_are_answered_401(
    headers: dict[str, str], guarded: TestClient, rejections: list[str]
) -> None:
    for method, path in (("POST", PATH), ("GET", "/v1/jobs/a"), ("GET", "/metrics")):
        response = guarded.request(method, path, json=PROMPT, headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert ErrorBody.model_validate(response.json()).error.code == "invalid_api_key"
        assert response.headers["x-request-id"]
    assert rejections == ["invalid_api_key"]  # routes count what they refuse themselves


def test_probes_and_pages_need_no_key(guarded: TestClient) -> None:
    for path in ("/healthz", "/docs", "/openapi.json"):
        assert guarded.get(path).status_code == 200
        assert guarded.get(path, headers=bearer("elastic_wrong")).status_code == 200


def test_calls_that_generate_nothing_are_not_counted(guarded: TestClient, rejections: list[str]) -> None:
    for _ in range(3):  # one more than the limit
        assert guarded.post("/healthz").status_code == 405
    assert not rejections


def test_body_without_a_valid_key_is_not_read(guarded: TestClient) -> None:
    response = guarded.post(PATH, content=b"{", headers={"Content-Type": "application/json"})
    assert response.status_code == 401  # not 400
    assert response.headers["connection"] == "close"


def test_server_without_keys_is_open(build_small_app: Callable[[Settings], FastAPI]) -> None:
    with TestClient(build_small_app(Settings())) as client:
        assert client.post(PATH, json=PROMPT).status_code == 200
        assert client.post(PATH, json=PROMPT, headers=bearer("none")).status_code == 200
        assert client.get("/v1/jobs/a").json()["key"] is None
        assert client.get("/metrics").status_code == 200
        assert not [name for name in client.post(PATH, json=PROMPT).headers if name.startswith("x-ratelimit")]


def test_openapi_says_where_a_key_is_needed(guarded: TestClient) -> None:
    document = guarded.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
    operations = {path: next(iter(methods.values())) for path, methods in document["paths"].items()}
    assert operations[PATH]["security"] == [{"ApiKey": []}]
    assert "security" not in operations["/healthz"]


def test_calls_over_the_limit_are_answered_429_with_a_wait(
    guarded: TestClient, keys: Keys, rejections: list[str]
) -> None:
    # When a key calls once more than it may
    answers = [guarded.post(PATH, json=PROMPT, headers=bearer(keys.maker)) for _ in range(3)]
    # Then each answer says what is left, and the last when to come back
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [answer.headers["x-ratelimit-limit-requests"] for answer in answers] == ["2"] * 3
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
    refused = answers[2]
    assert 50 <= int(refused.headers["retry-after"]) <= 61
    assert refused.headers["x-ratelimit-reset-requests"] == f"{refused.headers['retry-after']}s"
    assert ErrorBody.model_validate(refused.json()).error.code == "rate_limit_exceeded"
    assert rejections == ["rate_limit_exceeded"]
    # And other keys, and calls that make nothing, are free
    assert guarded.post(PATH, json=PROMPT, headers=bearer(keys.admin)).status_code == 200
    assert guarded.get("/v1/jobs/a", headers=bearer(keys.maker)).status_code == 200


def test_key_may_have_a_limit_of_its_own(guarded: TestClient, keys: Keys) -> None:
    answers = [guarded.post(PATH, json=PROMPT, headers=bearer(keys.metered)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]
    assert answers[1].headers["x-ratelimit-limit-requests"] == "1"


@pytest.mark.parametrize(
    ("addresses", "statuses"),
    [
        (("192.0.2.1", "192.0.2.1", "192.0.2.2"), [200, 429, 200]),
        (("2001:db8::1", "2001:db8::ffff:0:0:2", "2001:db8:0:1::1"), [200, 429, 200]),
        (("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.2"), [200, 429, 200]),
        (("fe80::1%eth0", "fe80::2%eth0", "testclient"), [200, 429, 200]),
    ],
)
def test_open_server_limits_addresses(
    addresses: tuple[str, ...], statuses: list[int], build_small_app: Callable[[Settings], FastAPI]
) -> None:
    app = build_small_app(Settings(rate_limit="1/minute"))
    clients = [TestClient(app, client=(address, 1)) for address in addresses]
    assert [client.post(PATH, json=PROMPT).status_code for client in clients] == statuses


@pytest.mark.parametrize(("trusted_proxies", "statuses"), [((), [200, 429]), (("127.0.0.0/8",), [200, 200])])
def test_only_a_trusted_proxy_says_for_whom_it_calls(
    trusted_proxies: tuple[str, ...], statuses: list[int], listen: Callable[[Settings], socket.socket]
) -> None:
    client = HTTPConnection("127.0.0.1")
    client.sock = listen(Settings(rate_limit="1/minute", trusted_proxies=trusted_proxies))
    given = []
    for address in ("192.0.2.1", "192.0.2.2"):
        headers = {"Content-Type": "application/json", "X-Forwarded-For": address}
        client.request("POST", PATH, json.dumps(PROMPT), headers)
        with client.getresponse() as response:
            given.append(response.status)
            response.read()
    assert given == statuses


def test_unreachable_store_is_answered_503(build_small_app: Callable[[Settings], FastAPI]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        settings = Settings(rate_limit="1/minute", redis_url=f"redis://127.0.0.1:{taken.getsockname()[1]}/0")
        with TestClient(build_small_app(settings)) as client:
            response = client.post(PATH, json=PROMPT)
            assert client.get("/v1/jobs/a").status_code == 200
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "store_unavailable"
    assert int(response.headers["retry-after"]) >= 1


def test_openai_client_sends_its_key_and_knows_our_answers(guarded: TestClient, keys: Keys) -> None:
    def client_of(secret: str) -> openai.OpenAI:
        return openai.OpenAI(base_url="http://testserver/v1", api_key=secret, http_client=guarded, max_retries=0)

    assert client_of(keys.maker).images.generate(prompt="a").data
    with pytest.raises(openai.AuthenticationError) as no_key:
        client_of("elastic_wrong").images.generate(prompt="a")
    assert no_key.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        client_of(keys.reader).images.generate(prompt="a")
    client_of(keys.metered).images.generate(prompt="a")
    with pytest.raises(openai.RateLimitError):
        client_of(keys.metered).images.generate(prompt="a")


def test_every_route_of_the_server_asks_for_a_key(start_client: Callable[..., TestClient], keys: Keys) -> None:
    client = start_client(keys.settings)
    open_paths = {"/healthz", "/readyz"}
    for path, methods in client.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            status = client.request(method, path.format(job_id="a", model_id="a")).status_code
            assert (status == 401, "security" in operation) == ((path not in open_paths,) * 2), path
            assert {"401", "403"} & set(operation["responses"]) == (set() if path in open_paths else {"401", "403"})
    text = client.get("/metrics", headers=bearer(keys.reader)).text
    assert 'elastic_requests_rejected_total{code="invalid_api_key",model=""}' in text


def test_job_belongs_to_the_key_that_made_it(start_client: Callable[..., TestClient], keys: Keys) -> None:
    client = start_client(keys.settings)
    job_id = client.post("/v1/images", json=PROMPT, headers=bearer(keys.maker)).json()["id"]
    for path in (f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/content", f"/v1/jobs/{job_id}/events"):
        assert client.get(path, headers=bearer(keys.maker)).status_code == 200
        assert client.get(path, headers=bearer(keys.admin)).status_code == 200
        stranger = client.get(path, headers=bearer(keys.metered))
        assert stranger.status_code == 404
        assert stranger.json()["error"]["code"] == "job_not_found"
    assert client.delete(f"/v1/jobs/{job_id}", headers=bearer(keys.metered)).status_code == 404


def test_key_lists_its_own_jobs_and_an_admin_those_of_all(start_client: Callable[..., TestClient], keys: Keys) -> None:
    client = start_client(keys.settings)
    made = {
        name: client.post(PATH, json=PROMPT, headers=bearer(secret)).json()["id"]
        for name, secret in (("maker", keys.maker), ("metered", keys.metered), ("admin", keys.admin))
    }

    def listed(secret: str, query: str = "") -> list[str]:
        return [job["id"] for job in client.get(f"/v1/jobs{query}", headers=bearer(secret)).json()["data"]]

    assert {name: listed(secret) for name, secret in (("maker", keys.maker), ("admin", keys.admin))} == {
        "maker": [made["maker"]],
        "admin": [made["admin"]],
    }
    assert listed(keys.admin, "?all=true") == [made["admin"], made["metered"], made["maker"]]
    refused = client.get("/v1/jobs?all=true", headers=bearer(keys.maker))
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
    # A cursor says nothing of other keys' jobs.
    foreign = client.get(f"/v1/jobs?after={made['admin']}", headers=bearer(keys.maker))
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (404, "job_not_found")
