"""What the OpenAPI document says is what the server does: `benchmarks.contract` with few cases."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient

from benchmarks.contract import SETTINGS, Findings, examine
from service.app import create_app
from service.running.dispatcher import Dispatcher
from service.settings import Settings


@pytest.fixture
def app(make_dispatcher: Callable[[Settings], Dispatcher]) -> FastAPI:
    return create_app(SETTINGS, make_dispatcher(SETTINGS))


def faults(findings: Findings) -> list[str]:
    return [*findings.failures.values(), *findings.errors]


@pytest.mark.slow
def test_random_requests_are_answered_as_documented(app: FastAPI) -> None:
    findings = examine(app, seed=0, cases_per_operation=12, sequences=0, phases=("examples", "coverage", "fuzzing"))
    assert not faults(findings)
    assert findings.cases["coverage"] > 500  # every border of every schema
    assert findings.cases["fuzzing"] > 80
    assert {status for _, status in findings.answers} >= {200, 401, 422}


def test_linked_operations_are_answered_as_documented(app: FastAPI) -> None:
    findings = examine(app, seed=0, cases_per_operation=1, sequences=20, phases=("stateful",))
    assert not faults(findings)
    assert findings.cases["stateful"] > 20


def test_faults_of_a_server_and_of_its_document_are_found() -> None:
    app = FastAPI()

    @app.get("/otherwise", response_model=int)
    async def answer_otherwise() -> JSONResponse:
        return JSONResponse("text")

    @app.get("/undocumented", response_model=int)
    async def answer_undocumented() -> JSONResponse:
        return JSONResponse(1, 203)

    @app.get("/broken")
    async def break_down() -> int:
        raise ZeroDivisionError

    findings = examine(app, seed=0, cases_per_operation=1, sequences=0, phases=("fuzzing",))
    assert {(name, operation) for name, operation, *_ in findings.failures} >= {
        ("response_schema_conformance", "GET /otherwise"),
        ("status_code_conformance", "GET /undocumented"),
        ("not_a_server_error", "GET /broken"),
    }


def test_document_has_the_version_of_the_distribution(client: TestClient) -> None:
    assert client.get("/openapi.json").json()["info"]["version"] == version("elastic-dit-serve")


def test_links_name_operations_and_parameters_that_exist(client: TestClient) -> None:
    document: dict[str, Any] = client.get("/openapi.json").json()
    operations = {
        operation["operationId"]: operation for path in document["paths"].values() for operation in path.values()
    }
    linked = []
    for operation in operations.values():
        for response in operation["responses"].values():
            for link in response.get("links", {}).values():
                linked.append(link["operationId"])
                names = {parameter["name"] for parameter in operations[link["operationId"]]["parameters"]}
                assert set(link["parameters"]) <= names
    assert set(linked) == {"show_job", "stream_events", "show_content", "cancel_job"}


@pytest.mark.parametrize("path", ["/v1/images", "/v1/images/generations", "/v1/images/edits", "/v1/meshes"])
def test_generation_answers_link_to_their_job(path: str, client: TestClient) -> None:
    responses = client.get("/openapi.json").json()["paths"][path]["post"]["responses"]
    for status in ("200", "202"):
        assert set(responses[status]["links"]) == {"show_job", "stream_events", "show_content", "cancel_job"}
        assert responses[status]["headers"]["X-Job-ID"]["required"] is True
