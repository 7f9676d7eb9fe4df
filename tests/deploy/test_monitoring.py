"""Prometheus's rules and Grafana's dashboard query metrics that exist."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/elastic-dit.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
METRIC = re.compile(r"\belastic_[a-z0-9_]+")
# The metrics of /metrics, with their labels.
CONTRACT = {
    "elastic_block_decisions_total": {"model", "block", "decision"},
    "elastic_steps_total": {"model", "decision"},
    "elastic_block_latency_seconds": {"model", "block"},
    "elastic_block_mlp_width_ratio": {"model", "block"},
    "elastic_router_latency_seconds": {"model"},
    "elastic_compute_ratio": {"model"},
    "elastic_predicted_compute_ratio_error": {"model"},
    "elastic_step_latency_seconds": {"model"},
    "elastic_stage_latency_seconds": {"model", "stage"},
    "elastic_generation_batch_size": {"model"},
    "elastic_batch_groups": {"model"},
    "elastic_requests_running": {"model"},
    "elastic_requests_waiting": {"model"},
    "elastic_request_queue_time_seconds": {"model"},
    "elastic_e2e_request_latency_seconds": {"model", "preset"},
    "elastic_requests_total": {"model", "status"},
    "elastic_requests_rejected_total": {"model", "code"},
    "elastic_deadline_total": {"model", "outcome"},
    "elastic_quality_degraded_total": {"model"},
    "elastic_jobs_recovered_total": set(),
    "elastic_store_errors_total": {"operation"},
    "elastic_gpu_memory_bytes": {"kind"},
    "elastic_compiled_graphs_total": {"model", "kind"},
    "elastic_prompts_total": {"model", "outcome"},
    "elastic_saving_results_total": {"model", "decisions"},
    "elastic_backlog_seconds": {"model"},
    "elastic_workers": {"model", "state"},
    "elastic_wanted_workers": {"model"},
    "elastic_worker_pace_ratio": {"model"},
}
LABELS_OF_PROMETHEUS = {"job", "instance", "le"}


def series_name(metric: str) -> str:
    """The metric of a series, without the suffixes of a histogram."""
    return re.sub(r"_(bucket|sum|count)$", "", metric)


def queries() -> list[str]:
    of_panels = [target["expr"] for panel in PANELS for target in panel["targets"]]
    return of_panels + [rule["expr"] for rule in RULES]


def served_names() -> set[str]:
    page = Metrics().exposition({}).decode()
    families = list(text_string_to_metric_families(page))
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}


@pytest.fixture(scope="module")
def promtool() -> str:
    path = shutil.which("promtool")
    if path is None:
        pytest.skip("needs promtool, from Debian's package prometheus")
    return path


def run(*command: str) -> str:
    result = subprocess.run(command, cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_prometheus_accepts_its_configuration(promtool: str) -> None:
    assert f"{len(RULES)} rules found" in run(promtool, "check", "config", "prometheus.yml")


def test_alerts_fire_when_they_should_and_only_then(promtool: str) -> None:
    assert "SUCCESS" in run(promtool, "test", "rules", "alerts_test.yml")


def test_every_alert_has_a_test_that_fires_and_one_that_does_not() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus/alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in RULES}
    assert {case["alertname"] for case in cases if "exp_alerts" in case} == names
    assert {case["alertname"] for case in cases if "exp_alerts" not in case} == names


def test_every_alert_has_a_paragraph_that_says_what_to_do() -> None:
    section = (ROOT / "docs/operation.md").read_text().split("### Alerts\n")[1].split("\n#")[0]
    explained = re.findall(r"^- \*\*(\w+)\*\*", section, re.MULTILINE)
    assert explained == [rule["alert"] for rule in RULES]


def test_prometheus_scrapes_servers_and_workers_on_their_port() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    api, worker = config["scrape_configs"]
    assert (api["job_name"], api["static_configs"]) == ("api", [{"targets": ["api:8000"]}])
    assert worker["job_name"] == "worker"
    assert (worker["dns_sd_configs"][0]["names"], worker["dns_sd_configs"][0]["port"]) == (["worker"], 8000)
    assert not any("metrics_path" in scrape for scrape in config["scrape_configs"])  # /metrics, the default


def test_every_query_parses(promtool: str, tmp_path: Path) -> None:
    """Queries are checked as recording rules: promtool of Prometheus 2 has no other way."""
    variables = {"$model": ".*", "$__rate_interval": "1m", "$__range": "1h"}
    rules = []
    for index, query in enumerate(queries()):
        for name, value in variables.items():
            query = query.replace(name, value)
        assert "$" not in query
        rules.append({"record": f"query_{index}", "expr": query})
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    run(promtool, "check", "rules", str(tmp_path / "rules.yml"))


def test_every_queried_metric_is_declared_and_served() -> None:
    used = {series_name(metric) for query in queries() for metric in METRIC.findall(query)}
    assert used <= CONTRACT.keys()
    assert used <= served_names()


def test_every_queried_label_belongs_to_its_metric() -> None:
    for query in queries():
        metrics = [series_name(metric) for metric in METRIC.findall(query)]
        known = set.union(*(CONTRACT[metric] for metric in metrics)) if metrics else set()
        groups = re.findall(r"\b(?:by|on) \(([^)]*)\)", query)
        matchers = re.findall(r"\{([^}]*)\}", query)
        used = {name.strip() for group in groups for name in group.split(",") if name.strip()}
        used |= {label for matcher in matchers for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matcher)}
        assert used <= known | LABELS_OF_PROMETHEUS, query


def test_dashboard_is_the_output_of_its_script(tmp_path: Path) -> None:
    for source in (DEPLOY / "grafana").glob("*.py"):
        shutil.copy(source, tmp_path)
    (tmp_path / "dashboards").mkdir()
    subprocess.run([sys.executable, str(tmp_path / "dashboard.py")], check=True, capture_output=True)
    written = json.loads((tmp_path / "dashboards/elastic-dit.json").read_text())
    assert written == DASHBOARD, "run python deploy/grafana/dashboard.py"


def test_dashboard_has_a_row_for_steps_one_for_workers_and_one_for_the_backlog() -> None:
    rows: dict[str, list[str]] = {}
    for panel in DASHBOARD["panels"]:
        if panel["type"] == "row":
            queried = rows.setdefault(panel["title"], [])
        else:
            queried += [metric for target in panel["targets"] for metric in METRIC.findall(target["expr"])]
    steps = {"elastic_steps_total", "elastic_step_latency_seconds", "elastic_generation_batch_size"}
    assert steps <= {series_name(metric) for metric in rows["Steps"]}
    assert {"elastic_workers", "elastic_worker_pace_ratio"} <= {*rows["Workers"]}
    queue = {"elastic_backlog_seconds", "elastic_requests_waiting", "elastic_wanted_workers", "elastic_workers"}
    assert queue <= {*rows["Backlog"]}


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert sorted(ids) == list(range(1, len(ids) + 1))
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_panels_use_the_dashboards_variables() -> None:
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "model"]
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            for metric, matcher in re.findall(r"(elastic_[a-z0-9_]+)(\{[^}]*\})?", target["expr"]):
                has_model = "model" in CONTRACT[series_name(metric)]
                assert ('model=~"$model"' in matcher) == has_model, target["expr"]


def test_grafana_is_provisioned_with_data_source_and_dashboard() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/elastic-dit.yml").read_text())["providers"]
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    folders = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    assert source["url"] == "http://prometheus:9090"
    assert folders["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert folders["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DEPLOY / "grafana/dashboards" / home.name).is_file()
    prometheus = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
