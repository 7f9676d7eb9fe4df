import json
import logging
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from pydantic import ValidationError

from service.api.middlewares import Middlewares
from service.errors import BadConfiguration
from service.keys import Scope, new_key
from service.logging import JsonFormatter, add_request_id
from service.settings import Settings

PATH = "/v1/images/generations"
ORIGIN = {"Origin": "https://pictures.example"}
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}


class Collector(ThreadingHTTPServer):
    """What receives traces. `spans` has them as they came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Span] = []
        self.paths: list[str] = []


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Encoding"] == "gzip":
            raise AssertionError("the exporter compresses; decompress here")
        request = ExportTraceServiceRequest.FromString(body)
        for resource in request.resource_spans:
            for spans in resource.scope_spans:
                self.server.spans += spans.spans
        self.server.paths.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join(20)


def test_other_origins_are_refused_by_default(build_small_app: Callable[[Settings], FastAPI]) -> None:
    with TestClient(build_small_app(Settings())) as client:
        assert client.options(PATH, headers=ORIGIN | PREFLIGHT).status_code == 405
        assert "access-control-allow-origin" not in client.get("/healthz", headers=ORIGIN).headers


def test_allowed_origins_may_call(build_small_app: Callable[[Settings], FastAPI]) -> None:
    _, entry = new_key("a", [Scope.GENERATE])
    settings = Settings(cors_origins=(ORIGIN["Origin"],), api_keys=f"[{entry.model_dump_json()}]")
    with TestClient(build_small_app(settings)) as client:
        preflight = client.options(PATH, headers=ORIGIN | PREFLIGHT)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN["Origin"]
        refused = client.post(PATH, json={"prompt": "a"}, headers=ORIGIN)
        assert refused.status_code == 401  # which a page must be able to read
        assert refused.headers["access-control-allow-origin"] == ORIGIN["Origin"]
        other = client.options(PATH, headers=PREFLIGHT | {"Origin": "https://other.example"})
        assert other.status_code == 400


# What browsers say of a call with each SDK, and of one that a tracer has added its headers to.
SENT_HEADERS = (
    "authorization,content-type,idempotency-key,openai-organization,openai-project,x-stainless-arch,x-stainless-lang,"
    "x-stainless-os,x-stainless-package-version,x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,"
    "x-stainless-timeout",
    "authorization,http-referer,x-title",
    "baggage,content-type,sentry-trace,traceparent,tracestate",
    "cache-control,last-event-id",
    "prefer,x-request-id",
)


@pytest.mark.parametrize("names", SENT_HEADERS)
@pytest.mark.parametrize("origins", [(ORIGIN["Origin"],), ("*",)])
def test_pages_of_allowed_origins_may_send_any_header(
    names: str, origins: tuple[str, ...], build_small_app: Callable[[Settings], FastAPI]
) -> None:
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": names,
        "Access-Control-Request-Private-Network": "true",  # Chromium's, of a public page that calls localhost
    }
    with TestClient(build_small_app(Settings(cors_origins=origins))) as client:
        preflight = client.options(PATH, headers=ORIGIN | asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origins[0]
    assert {"GET", "HEAD", "POST", "DELETE"} <= set(preflight.headers["access-control-allow-methods"].split(", "))
    assert set(names.split(",")) <= set(preflight.headers["access-control-allow-headers"].split(","))


@pytest.mark.parametrize(
    ("prompt", "key", "status"), [("a", "", 200), ("a", "wrong", 401), ("break", "", 500), ("long" * 9000, "", 413)]
)
def test_pages_of_allowed_origins_may_read_every_answer(
    prompt: str, key: str, status: int, build_small_app: Callable[[Settings], FastAPI]
) -> None:
    secret, entry = new_key("a", [Scope.GENERATE])
    settings = Settings(
        cors_origins=(ORIGIN["Origin"],), api_keys=f"[{entry.model_dump_json()}]", max_body_bytes=20_000
    )
    with TestClient(build_small_app(settings), raise_server_exceptions=False) as client:
        answer = client.post(
            PATH, json={"prompt": prompt}, headers=ORIGIN | {"Authorization": f"Bearer {key or secret}"}
        )
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == ORIGIN["Origin"]
    # All of them: the name * holds for calls without cookies, the only ones that are allowed.
    assert answer.headers["access-control-expose-headers"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


def test_origins_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_CORS_ORIGINS", "https://a.example, https://b.example")
    assert Settings().cors_origins == ("https://a.example", "https://b.example")
    monkeypatch.setenv("ELASTIC_CORS_ORIGINS", "")
    assert Settings().cors_origins == ()


@pytest.mark.parametrize("prompt", ["s3cret cat", "break"])
def test_prompts_and_keys_are_not_logged(
    prompt: str, build_small_app: Callable[[Settings], FastAPI], caplog: pytest.LogCaptureFixture
) -> None:
    # Given a server that logs all it can
    caplog.set_level(logging.DEBUG)
    formatter = JsonFormatter()
    caplog.handler.addFilter(add_request_id)
    secret, entry = new_key("ci", [Scope.GENERATE])
    with TestClient(
        build_small_app(Settings(api_keys=f"[{entry.model_dump_json()}]")), raise_server_exceptions=False
    ) as client:
        # When it is sent prompts and keys, right ones and wrong ones
        for key in (secret, "s3cret-key"):
            for body in ({"prompt": prompt, "more": "s3cret"}, "s3cret", {"s3cret": 1}):
                client.post(
                    PATH,
                    json=body,
                    headers={"Authorization": f"Bearer {key}", "X-Request-ID": "request-1"},
                    params={"key": secret},
                )
    caplog.handler.removeFilter(add_request_id)
    # Then its lines have neither, but say who called; the lines of httpx are the client's
    ours = [json.loads(formatter.format(record)) for record in caplog.records if not record.name.startswith("http")]
    assert secret not in str(ours)
    assert "s3cret" not in str(ours)
    lines = [line for line in ours if line["logger"] == "service.api.request_log"]
    assert len(lines) == 6
    assert {line["key_id"] for line in lines if "key_id" in line} == {"ci"}
    assert all(line["request_id"] == "request-1" for line in lines)


def test_requests_become_spans_of_their_callers_trace(
    collector: Collector, build_small_app: Callable[[Settings], FastAPI]
) -> None:
    # Given a server that sends its traces to a collector
    settings = Settings(otlp_endpoint=f"http://127.0.0.1:{collector.server_port}/")
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with TestClient(build_small_app(settings)) as client:
        # When a client calls within a trace, and one without
        client.get("/v1/jobs/a?key=s3cret", headers={"traceparent": f"00-{trace_id}-{parent_id}-01"})
        client.post(PATH, json={"prompt": "s3cret"}, headers={"Authorization": "Bearer s3cret"})
    # Then both spans were sent before the server ended
    assert collector.paths == ["/v1/traces"]
    first, second = collector.spans
    assert (first.name, second.name) == ("GET /v1/jobs/{job_id}", f"POST {PATH}")
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (trace_id, parent_id)
    assert second.trace_id.hex() != trace_id
    attributes = {attribute.key: attribute.value for attribute in second.attributes}
    assert attributes["http.route"].string_value == PATH
    assert attributes["http.response.status_code"].int_value == 200
    # And they hold nothing secret
    assert "s3cret" not in str(collector.spans)


def test_traces_without_their_packages_are_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "service.tracing", raising=False)
    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(BadConfiguration, match=r"pip install 'elastic-dit-serve\[tracing\]'"):
        Middlewares(Settings(otlp_endpoint="http://127.0.0.1:4318"))


def test_endpoint_must_be_a_url() -> None:
    with pytest.raises(ValidationError, match="otlp_endpoint"):
        Settings(otlp_endpoint="localhost:4318")
