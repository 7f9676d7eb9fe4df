"""Does the server answer as its OpenAPI document says, for any request?

`python -m benchmarks.contract --cases 5000` runs schemathesis against an application in this process. The application
has API keys, and the engine of tests/service/conftest.py, which draws instead of computing. There are three phases:

1. every boundary of every schema ("coverage");
2. random requests, valid and invalid, in rounds with a new seed each, until there are `--cases` cases;
3. sequences of calls that follow the document's links from the jobs that earlier calls created.

With `--socket`, all this runs against the real server over sockets: `elastic-dit serve` with the small models and the
default limits. Rounds alternate between two API keys, one of which may do everything. Afterwards, bodies at and above
the limits are sent, and one key asks for a job of the other. There, a valid request may also be refused because of the
load (503 `overloaded`) or the rate limit (429).

Every answer must have a status, a content type, headers and a body that the document names for its call, and none may
be a 500. Requests that the document forbids must be refused: unknown methods with 405 and `Allow`, and calls without a
key or with a wrong key with 401. The exit status is 1 if any check fails.
"""

import argparse
import importlib.util
import logging
import sys
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any
from zlib import crc32

import schemathesis
from fastapi import FastAPI
from hypothesis import strategies as st
from PIL import Image
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from schemathesis.engine.recorder import CheckFailureInfo, RecordedScenario
from schemathesis.python.asgi import shutdown_lifespans
from schemathesis.transport.serialization import Binary
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as ASGIScope

from benchmarks.contract_server import (
    ADMIN_KEY,
    CLIENT_KEY,
    IMAGE_MODEL,
    MESH_MODEL,
    real_server,
    try_foreign_jobs,
    try_large_bodies,
)
from benchmarks.table import TableRow, finish, show
from service.app import build_dispatcher, create_app
from service.keys import Scope, new_key
from service.settings import Settings

logger = logging.getLogger(__name__)

ALL_PHASES = ("examples", "coverage", "fuzzing", "stateful")

KEY, _ENTRY = new_key("contract", [Scope.ADMIN])
SETTINGS = Settings(
    api_keys=f"[{_ENTRY.model_dump_json()}]",
    max_body_bytes=20_000,
    max_mesh_body_bytes=200_000,
    max_edit_body_bytes=200_000,
    max_result_bytes=64_000_000,
    max_backlog_s=1e9,  # so that load on the machine refuses nothing
    grace_s=5,
)

_CASES_PER_ROUND = 100
"""The most for each operation."""
_ANSWER_S = 300.0
"""Requests that wait for results wait for those of earlier requests too."""

# Statuses of a valid request. It can still be refused for facts that the document can't express, such as a model's
# limits, the content of an image, or a job that has ended.
_STATUSES_OF_VALID = ["2xx", "400", "404", "409", "410", "413", "422"]

# Fields that exclude one another, or that only some models and servers accept.
_RARELY_VALID = (
    *("negative_prompt", "true_cfg_scale", "width", "height", "output_compression", "webhook_url", "quality", "budget"),
    *("partial_images", "response_format", "octree_resolution", "images", "mask"),
)


@dataclass(slots=True)
class Findings:
    """Answers, cases and checks, counted; and the failures, each once, with a command that reproduces it."""

    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    cases: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, str | None, str, str], str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def add(self, phase: str, scenario: RecordedScenario) -> None:
        for case_id, interaction in scenario.interactions.items():
            if interaction.response is None:
                self.errors.append(f"{scenario.cases[case_id].value.operation.label}: no answer")
                continue
            self.cases[phase] += 1
            self.answers[scenario.cases[case_id].value.operation.label, interaction.response.status_code] += 1
        for checks in scenario.checks.values():
            for check in checks:
                self.checks[check.name] += 1
                if check.failure_info is not None:
                    self._add_failure(check.name, check.failure_info)

    def _add_failure(self, name: str, info: CheckFailureInfo) -> None:
        failure = info.failure
        text = f"{name} of {failure.operation}: {failure.title}\n{failure.message}\n{info.code_sample}"
        self.failures.setdefault((name, failure.operation, failure.title, failure.message[:200]), text)


@dataclass(frozen=True, slots=True)
class Target:
    """A server to examine: an application in this process or an address, with a key and the models to ask for.

    `is_limited` says that a valid request may be refused because of the load.
    """

    server: ASGIApp | str
    key: str = KEY
    image_model: str = "guided"
    mesh_model: str = "ball"
    size: str = "32x48"
    is_limited: bool = False

    def schema(self, config: SchemathesisConfig) -> Any:
        if isinstance(self.server, str):
            return schemathesis.openapi.from_url(f"{self.server}/openapi.json", config=config)
        return schemathesis.openapi.from_asgi("/openapi.json", self.server, config=config)


def examine(
    app: FastAPI, *, seed: int, cases_per_operation: int, sequences: int, phases: Sequence[str] = ALL_PHASES
) -> Findings:
    """What schemathesis finds wrong with `app`, whose admin key is `KEY`. The application is shut down afterwards.

    `cases_per_operation` limits the phase "fuzzing"; `sequences` is the number of sequences in the phase "stateful".
    """
    try:
        findings = Findings()
        for _ in _examine(Target(as_servers_run(app)), findings, seed, cases_per_operation, sequences, phases):
            pass
        return findings
    finally:
        shutdown_lifespans()


def _examine(
    target: Target, findings: Findings, seed: int, cases_per_operation: int, sequences: int, phases: Sequence[str]
) -> Iterator[None]:
    """Yield after each scenario that was added to `findings`."""
    config = SchemathesisConfig.from_dict(_config(target, seed, cases_per_operation, sequences, phases))
    schema = target.schema(config)
    schema.hook(_map_case(target))
    for event in from_schema(schema).execute():
        match event:
            case events.ScenarioFinished():
                findings.add(event.phase.value, event.recorder)
                yield
            case events.NonFatalError():
                findings.errors.append(f"{event.label}: {event.value!r}")
            case events.FatalError():
                raise event.exception


def as_servers_run(app: ASGIApp) -> ASGIApp:
    """`app`, with exceptions logged as a server does. Starlette re-raises a bug after it has answered 500."""

    async def run(scope: ASGIScope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except Exception:
            if scope["type"] != "http":
                raise
            logger.exception("a bug in %s %s", scope["method"], scope["path"])

    return run


def _config(
    target: Target, seed: int, cases_per_operation: int, sequences: int, phases: Sequence[str]
) -> dict[str, Any]:
    """The configuration, in the format of schemathesis.toml."""
    expected = [*_STATUSES_OF_VALID, *_load_statuses(target)]
    return {
        "seed": seed,
        "continue-on-failure": True,
        "request-timeout": _ANSWER_S,
        "auth": {"openapi": {"ApiKey": {"bearer": target.key}}},
        "generation": {"max-examples": cases_per_operation, "database": "none", "no-shrink": True},
        "phases": {
            **{phase: {"enabled": phase in phases} for phase in ALL_PHASES},
            "stateful": {"enabled": "stateful" in phases, "generation": {"max-examples": sequences}},
        },
        "checks": {
            # DELETE cancels a job, but its record stays, and clients may read it afterwards.
            "use_after_free": {"enabled": False},
            "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", *_load_statuses(target)[1:]]},
        },
        "operations": [
            {
                "include-tag": ["images", "meshes", "jobs"],
                "checks": {"positive_data_acceptance": {"expected-statuses": expected}},
            }
        ],
        "output": {"sanitization": {"enabled": False}},
    }


def _load_statuses(target: Target) -> list[str]:
    """The statuses of requests that are refused because of the rate limit, and because of the load."""
    return ["429", "503"] if target.is_limited else []


def _map_case(target: Target) -> Callable[[schemathesis.HookContext, schemathesis.Case[Any]], schemathesis.Case[Any]]:
    def map_case(context: schemathesis.HookContext, case: schemathesis.Case[Any]) -> schemathesis.Case[Any]:
        return _with_valid_body(case, target)

    return map_case


def _with_valid_body(case: schemathesis.Case[Any], target: Target) -> schemathesis.Case[Any]:
    """Change every second valid request so that this server can run it, and so that there are jobs to follow."""
    if case.meta is None or not case.meta.generation.mode.is_positive or len(str(case.body)) % 2:
        return case
    # Forms are left alone: schemathesis counts any changed body with a file as invalid.
    if isinstance(case.body, dict) and case.media_type == "application/json":
        body: dict[str, Any] = {name: value for name, value in case.body.items() if name not in _RARELY_VALID}
        if "input_image" in body:
            body |= {"model": target.mesh_model, "input_image": b64encode(_IMAGE).decode()}
        else:
            body |= {"model": target.image_model, "size": target.size}
        if case.operation.path == "/v1/images/edits":
            body["image"] = b64encode(_IMAGE).decode()
        body["num_inference_steps"] = 2
        if not body.get("stream"):
            case.headers["prefer"] = ("respond-async", "respond-async; wait=1", "wait=1")[crc32(str(body).encode()) % 3]
        case.body = body
    return case


def _png() -> bytes:
    file = BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    return file.getvalue()


_IMAGE = _png()
# The content of files in forms.
schemathesis.openapi.format("binary", (st.just(_IMAGE) | st.binary()).map(Binary))


def drawn_app() -> FastAPI:
    """An application with the tests' engine, which is not part of the installed packages."""
    path = Path(__file__).parents[1] / "tests/service/conftest.py"
    spec = importlib.util.spec_from_file_location("drawn_engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their annotations there
    spec.loader.exec_module(module)
    dispatcher = build_dispatcher(SETTINGS, module.DrawnEngine)
    dispatcher.worker.start()
    return create_app(SETTINGS, dispatcher)


def answer_rows(findings: Findings) -> list[TableRow]:
    """One row per operation, with a column for each status."""
    statuses = sorted({status for _, status in findings.answers})
    operations = sorted({operation for operation, _ in findings.answers})
    return [
        {**{str(status): findings.answers[operation, status] or None for status in statuses}, "operation": operation}
        for operation in operations
    ]


def examine_in_rounds(targets: Sequence[Target], num_cases: int, num_sequences: int, seed: int) -> tuple[Findings, int]:
    """All findings of the three phases, and how many rounds of fuzzing there were, at one target after the other.

    Prints progress.
    """
    findings, began, num_rounds = Findings(), time.perf_counter(), 0

    def run(target: Target, seed: int, phases: Sequence[str]) -> None:
        shown = time.perf_counter()
        for _ in _examine(target, findings, seed, _CASES_PER_ROUND, num_sequences, phases):
            if time.perf_counter() - shown > 10:
                shown = time.perf_counter()
                print(f"{shown - began:6.0f} s  {findings.cases.total():6} cases", flush=True)

    try:
        run(targets[0], seed, ("examples", "coverage"))
        while findings.cases.total() < num_cases:
            num_rounds += 1
            run(targets[num_rounds % len(targets)], seed + num_rounds, ("fuzzing",))
        run(targets[0], seed, ("stateful",))
    finally:
        shutdown_lifespans()
    return findings, num_rounds


def _examine_app(num_cases: int, num_sequences: int, seed: int) -> tuple[Findings, int, dict[str, Any]]:
    return *examine_in_rounds([Target(as_servers_run(drawn_app()))], num_cases, num_sequences, seed), {}


def _examine_server(num_cases: int, num_sequences: int, seed: int) -> tuple[Findings, int, dict[str, Any]]:
    """The findings, the number of rounds, and what was asked by hand."""
    models = {"image_model": IMAGE_MODEL, "mesh_model": MESH_MODEL, "size": "64x64"}
    with real_server() as url:
        targets = [Target(url, key, **models, is_limited=True) for key in (ADMIN_KEY, CLIENT_KEY)]
        findings, num_rounds = examine_in_rounds(targets, num_cases, num_sequences, seed)
        large, faults = try_large_bodies(url)
        findings.errors += [*faults, *try_foreign_jobs(url)]
    return findings, num_rounds, {"large_bodies": large}


def result_of(findings: Findings) -> dict[str, Any]:
    """The counts, as JSON takes them."""
    answers: dict[str, dict[str, int]] = {}
    for (operation, status), count in sorted(findings.answers.items()):
        answers.setdefault(operation, {})[str(status)] = count
    return {
        "cases": findings.cases.total(),
        "cases_by_phase": dict(findings.cases),
        "checks": dict(sorted(findings.checks.items())),
        "answers": answers,
        "failures": len(findings.failures),
        "errors": len(findings.errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="the least number of requests before the sequences")
    parser.add_argument("--sequences", type=int, default=200, help="sequences of calls that follow links")
    parser.add_argument("--socket", action="store_true", help="ask the real server, in a process of its own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the result to this file")
    arguments = parser.parse_args()
    from benchmarks.environment import environment  # imports torch, which the tests of this module do without

    began = time.perf_counter()
    examine_all = _examine_server if arguments.socket else _examine_app
    findings, num_rounds, more = examine_all(arguments.cases, arguments.sequences, arguments.seed)
    show("answers", answer_rows(findings))
    show("checks", [{"number": count, "check": name} for name, count in sorted(findings.checks.items())])
    for text in (*findings.failures.values(), *findings.errors):
        print(f"\n{text}")
    result = {
        "benchmark": "contract",
        **environment(),
        "schemathesis": schemathesis.__version__,
        "seed": arguments.seed,
        "rounds": num_rounds,
        "seconds": round(time.perf_counter() - began, 1),
        **result_of(findings),
        **more,
    }
    finish(result, arguments.json)
    if findings.failures or findings.errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
