"""Writes the alerts of deploy/prometheus as an object of Prometheus' operator: python deploy/k8s/prometheus_rule.py"""

from pathlib import Path

import yaml

DEPLOY = Path(__file__).parents[1]
OUT = DEPLOY / "k8s/monitoring/rules.yaml"


def text() -> str:
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "elastic-dit"},
        "spec": yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text()),
    }
    note = "# Made of deploy/prometheus/alerts.yml by deploy/k8s/prometheus_rule.py; change that file, not this one.\n"
    return note + yaml.safe_dump(rule, sort_keys=False, width=110)


if __name__ == "__main__":
    OUT.write_text(text())
