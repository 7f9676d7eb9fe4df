"""What KEDA and Prometheus are asked in a cluster."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.metrics import ALL_SERIES
from tests.fixtures.kubernetes import FOLDER, of_kind

TRIGGERS: list[dict[str, Any]] = [
    trigger["metadata"] for item in of_kind("gpu", "ScaledObject") for trigger in item["spec"]["triggers"]
]
QUERIES = [str(trigger["query"]) for trigger in TRIGGERS]


@pytest.fixture(scope="module")
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("needs promtool, from Debian's package prometheus")
    return path


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rules_are_made_of_the_alerts() -> None:
    spec = importlib.util.spec_from_file_location("prometheus_rule", FOLDER / "prometheus_rule.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.text() == module.OUT.read_text(), "run python deploy/k8s/prometheus_rule.py"


def test_autoscalers_query_declared_metrics_by_their_labels() -> None:
    labels = {series.name: set(series.labels) for series in ALL_SERIES}
    assert len(QUERIES) == 3
    for query in QUERIES:
        for metric, matchers in re.findall(r"(elastic_\w+)(\{[^}]*\})?", query):
            assert set(re.findall(r"(\w+)=", matchers)) <= labels[metric]


def test_rules_and_queries_parse(promtool: str, tmp_path: Path) -> None:
    (rule,) = of_kind("gpu", "PrometheusRule")
    asked = [{"record": f"query_{index}", "expr": query} for index, query in enumerate(QUERIES)]
    groups = [*rule["spec"]["groups"], {"name": "autoscalers", "rules": asked}]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))
    run(promtool, "check", "rules", str(tmp_path / "rules.yml"))


def test_queries_answer_one_number_or_nothing(promtool: str, tmp_path: Path) -> None:
    """Nothing means that KEDA keeps the workers that are there, or takes 0 if the trigger ignores that."""
    _, wanted, refused = QUERIES

    def asks(query: str, minute: int, *numbers: int) -> dict[str, Any]:
        samples = [{"labels": "{}", "value": number} for number in numbers]
        return {"expr": query, "eval_time": f"{minute}m", "exp_samples": samples}

    qwen = 'elastic_wanted_workers{job="api", instance="%s", model="Qwen-Image"}'
    flux = 'elastic_wanted_workers{job="api", instance="a", model="FLUX.1-dev"}'
    calls = 'elastic_requests_rejected_total{instance="%s", model="Qwen-Image", code="model_unavailable"}'
    other = 'elastic_requests_rejected_total{instance="a", model="Qwen-Image", code="overloaded"}'
    cases = [
        ({qwen % "a": "3x60", qwen % "b": "3x60", flux: "1x60"}, [asks(wanted, 10, 3)]),  # two nodes report one number
        ({flux: "1x60"}, [asks(wanted, 10, 0)]),  # the model has no workers and no jobs
        ({}, [asks(wanted, 10), asks(refused, 10)]),  # nothing is scraped
        (
            {calls % "a": "_x20 1x60", calls % "b": "_x21 2x60", other: "5x80"},
            [asks(refused, 19), asks(refused, 20, 1), asks(refused, 30, 1), asks(refused, 50, 0)],
        ),
    ]
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": expected,
        }
        for series, expected in cases
    ]
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": tests}))
    run(promtool, "test", "rules", str(tmp_path / "test.yml"))
