"""Write the dashboard of Grafana: `python deploy/grafana/dashboard.py`. A test holds its file to what this says.

The JSON of a panel is mostly layout and repetition; here a panel is its title, its unit and its queries. The metrics
are those of `service/metrics.py`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "dashboards" / "elastic-dit.json"
# Of Grafana 12; newer ones read older schemas and migrate them in memory.
SCHEMA_VERSION = 41
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
OF_MODEL = 'model=~"$model"'
_COLUMNS = 24
_RED, _AMBER, _GREEN = "semi-dark-red", "semi-dark-orange", "semi-dark-green"


@dataclass(frozen=True, slots=True)
class Query:
    """`legend` is a template over the series' labels. An instant query gives one table instead of series over time."""

    expr: str
    legend: str = ""
    is_instant: bool = False
    is_heatmap: bool = False

    def target(self, index: int) -> dict[str, Any]:
        return {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "expr": self.expr,
            "legendFormat": self.legend or "__auto",
            "format": "table" if self.is_instant else "heatmap" if self.is_heatmap else "time_series",
            "instant": self.is_instant,
            "range": not self.is_instant,
        }


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    maximum: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    custom: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[dict[str, Any], ...] = ()
    transformations: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """Panels under a heading; `repeat` names a variable, for each value of which the row is drawn."""

    title: str
    panels: tuple[Panel, ...]
    repeat: str | None = None


def stat(title: str, description: str, unit: str, expr: str) -> Panel:
    options = {
        "colorMode": "value",
        "graphMode": "area",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "value",
    }
    return Panel(title, description, unit, (Query(expr),), "stat", width=4, height=4, options=options)


def lines(title: str, description: str, unit: str, *queries: Query, **more: Any) -> Panel:
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 10, "showPoints": "never", "spanNulls": False}
    return Panel(title, description, unit, queries, options=options, custom=custom, **more)


def lines_by_block(title: str, description: str, unit: str, expr: str, **more: Any) -> Panel:
    """As many lines as the model has blocks, with their means in a table."""
    options = {
        "legend": {"displayMode": "table", "placement": "right", "showLegend": True, "calcs": ["mean"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    custom = {"drawStyle": "line", "lineWidth": 1, "fillOpacity": 0, "showPoints": "never", "spanNulls": False}
    return Panel(
        title, description, unit, (Query(expr, "{{block}}"),), width=12, options=options, custom=custom, **more
    )


def quantile(q: float, metric: str, *labels: str) -> str:
    by = ", ".join([*labels, "le"])
    return f"histogram_quantile({q}, sum by ({by}) (rate({metric}_bucket{{{OF_MODEL}}}[$__rate_interval])))"


def mean(metric: str, *labels: str) -> str:
    return ratio(f"{metric}_sum", f"{metric}_count", *labels)


def ratio(above: str, below: str, *labels: str) -> str:
    by = f" by ({', '.join(labels)})" if labels else ""
    window = f"{{{OF_MODEL}}}[$__rate_interval]"
    return f"sum{by} (rate({above}{window})) / sum{by} (rate({below}{window}))"


def share_of_decision(decision: str) -> str:
    decided = (
        f'sum by (block) (rate(elastic_block_decisions_total{{{OF_MODEL}, decision="{decision}"}}[$__rate_interval]))'
    )
    return f"{decided} / sum by (block) (rate(elastic_block_decisions_total{{{OF_MODEL}}}[$__rate_interval]))"


def median_and_p95(metric: str, *labels: str) -> tuple[Query, Query]:
    legend = " ".join(f"{{{{{label}}}}}" for label in labels)
    return (
        Query(quantile(0.5, metric, *labels), f"{legend} p50"),
        Query(quantile(0.95, metric, *labels), f"{legend} p95"),
    )


def or_none(expr: str) -> str:
    """Series that begin with the first such event: until then, a zero instead of "No data"."""
    return f"{expr} or vector(0)"


# How many wait is a fact about the shared queue that every process tells, how many run is each process's own.
RUNNING = f"sum by (model) (elastic_requests_running{{{OF_MODEL}}})"
WAITING = f"max by (model) (elastic_requests_waiting{{{OF_MODEL}}})"
_ROWS_OF_BLOCKS = f"elastic_block_decisions_total{{{OF_MODEL}}}"

NOW = Row(
    "Now",
    (
        stat(
            "Requests a minute",
            "That ended, however they ended.",
            "none",
            f"sum(rate(elastic_requests_total{{{OF_MODEL}}}[$__rate_interval])) * 60",
        ),
        stat("Running", "Requests that a process has claimed.", "none", f"sum({RUNNING})"),
        stat("Waiting", "Requests in the queue.", "none", f"sum({WAITING})"),
        stat(
            "Latency, p95",
            "From a request's arrival to its result.",
            "s",
            quantile(0.95, "elastic_e2e_request_latency_seconds"),
        ),
        stat(
            "Compute ratio",
            "Mean share of the dense model's block compute that a picture or mesh took.",
            "percentunit",
            mean("elastic_compute_ratio"),
        ),
        stat(
            "Skipped or re-used",
            "Share of the block rows that did not run.",
            "percentunit",
            f'1 - sum(rate(elastic_block_decisions_total{{{OF_MODEL}, decision="run"}}[$__rate_interval]))'
            f" / sum(rate({_ROWS_OF_BLOCKS}[$__rate_interval]))",
        ),
    ),
)

REQUESTS = Row(
    "Requests",
    (
        lines(
            "Latency by preset",
            "From a request's arrival to its result. Budgets that name no preset are under the form that they have.",
            "s",
            *median_and_p95("elastic_e2e_request_latency_seconds", "preset"),
        ),
        lines(
            "Time in the queue",
            "From a request's arrival until it was claimed.",
            "s",
            *median_and_p95("elastic_request_queue_time_seconds", "model"),
        ),
        lines(
            "Running and waiting",
            "Of all processes that share the queue.",
            "none",
            Query(RUNNING, "{{model}} running"),
            Query(WAITING, "{{model}} waiting"),
        ),
        lines(
            "Stages",
            "Mean time of a picture or mesh in each stage.",
            "s",
            Query(mean("elastic_stage_latency_seconds", "model", "stage"), "{{model}} {{stage}}"),
        ),
        lines(
            "Requests that ended",
            "By status.",
            "reqps",
            Query(
                f"sum by (status) (rate(elastic_requests_total{{{OF_MODEL}}}[$__rate_interval]))",
                "{{status}}",
            ),
        ),
        lines(
            "Deadlines and lowered quality",
            "Requests with a deadline by outcome, and requests whose quality was lowered within what they allow.",
            "reqps",
            Query(
                or_none(f"sum by (outcome) (rate(elastic_deadline_total{{{OF_MODEL}}}[$__rate_interval]))"),
                "deadline {{outcome}}",
            ),
            Query(
                or_none(f"sum(rate(elastic_quality_degraded_total{{{OF_MODEL}}}[$__rate_interval]))"),
                "lowered quality",
            ),
        ),
    ),
)

COMPUTE = Row(
    "Elastic compute",
    (
        lines(
            "Compute ratio",
            "Share of the dense model's block compute that pictures and meshes took; a tenth takes more than p90.",
            "percentunit",
            Query(mean("elastic_compute_ratio", "model"), "{{model}} mean"),
            Query(quantile(0.9, "elastic_compute_ratio", "model"), "{{model}} p90"),
            maximum=1,
        ),
        lines(
            "Error of the predicted compute ratio",
            "Distance between what was counted and what the calibration said. Where it stays high, calibrate anew with "
            "prompts like those that come.",
            "percentunit",
            Query(mean("elastic_predicted_compute_ratio_error", "model"), "{{model}} mean"),
            Query(quantile(0.95, "elastic_predicted_compute_ratio_error", "model"), "{{model}} p95"),
        ),
        lines(
            "Batch size",
            "Pictures or meshes that shared a denoise step, mean.",
            "none",
            Query(mean("elastic_generation_batch_size", "model"), "{{model}}"),
        ),
        lines(
            "Denoise step",
            "Time of one step of a batch.",
            "s",
            *median_and_p95("elastic_step_latency_seconds", "model"),
        ),
        lines(
            "Routers",
            "Share of a step's time that goes into deciding.",
            "percentunit",
            Query(
                ratio("elastic_router_latency_seconds_sum", "elastic_step_latency_seconds_sum", "model"), "{{model}}"
            ),
        ),
        lines(
            "GPU memory",
            "Nothing on a CPU.",
            "bytes",
            Query(or_none("sum by (instance, kind) (elastic_gpu_memory_bytes)"), "{{instance}} {{kind}}"),
        ),
    ),
)


def _coloured(decision: str, colour: str) -> dict[str, Any]:
    return {
        "matcher": {"id": "byName", "options": decision},
        "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}],
    }


BLOCKS = Row(
    "Blocks of $model",
    (
        Panel(
            "Decisions by block",
            "Rows of batches that each block ran, re-used and skipped, in the time that is shown.",
            "percentunit",
            (
                Query(
                    f"sum by (block, decision) (increase({_ROWS_OF_BLOCKS}[$__range]))"
                    f" / on (block) group_left () sum by (block) (increase({_ROWS_OF_BLOCKS}[$__range]))",
                    is_instant=True,
                ),
            ),
            "barchart",
            width=12,
            maximum=1,
            options={
                "orientation": "auto",
                "xField": "block\\decision",
                "stacking": "normal",
                "showValue": "never",
                "barWidth": 0.9,
                "groupWidth": 0.7,
                "xTickLabelRotation": -45,
                "xTickLabelSpacing": 0,
                "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
                "tooltip": {"mode": "multi", "sort": "none"},
            },
            custom={"fillOpacity": 80, "lineWidth": 0},
            overrides=(_coloured("run", _RED), _coloured("reuse", _AMBER), _coloured("skip", _GREEN)),
            transformations=(
                {
                    "id": "groupingToMatrix",
                    "options": {"rowField": "block", "columnField": "decision", "valueField": "Value"},
                },
            ),
        ),
        Panel(
            "Time of a block",
            "One block in one step of a batch: how often it took how long, all blocks together.",
            "s",
            (
                Query(
                    f"sum by (le) (increase(elastic_block_latency_seconds_bucket{{{OF_MODEL}}}[$__rate_interval]))",
                    "{{le}}",
                    is_heatmap=True,
                ),
            ),
            "heatmap",
            width=12,
            options={
                "calculate": False,
                "cellGap": 1,
                "color": {"mode": "scheme", "scheme": "Oranges", "exponent": 0.5, "steps": 64, "fill": "dark-orange"},
                "exemplars": {"color": "rgba(255,0,255,0.7)"},
                "filterValues": {"le": 1e-9},
                "legend": {"show": True},
                "rowsFrame": {"layout": "auto"},
                "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": True},
                "yAxis": {"axisPlacement": "left", "reverse": False, "unit": "s"},
            },
        ),
        lines_by_block(
            "Skip rate by block",
            "Share of the rows that skip it.",
            "percentunit",
            share_of_decision("skip"),
            maximum=1,
        ),
        lines_by_block(
            "Re-use rate by block",
            "Share of the rows that add what it gave in an earlier step.",
            "percentunit",
            share_of_decision("reuse"),
            maximum=1,
        ),
        lines_by_block(
            "Latency by block, p95",
            "Time of one step of a batch. It falls where rows are skipped, since what is not run takes no time.",
            "s",
            quantile(0.95, "elastic_block_latency_seconds", "block"),
        ),
        lines_by_block(
            "MLP width by block",
            "Mean of the rows that run it.",
            "percentunit",
            mean("elastic_block_mlp_width_ratio", "block"),
            maximum=1,
        ),
    ),
    repeat="model",
)

TROUBLE = Row(
    "Trouble",
    (
        lines(
            "Refused requests",
            "By the error's code. Until the first one there is a line of zero without a name.",
            "reqps",
            Query(
                or_none(f"sum by (code) (rate(elastic_requests_rejected_total{{{OF_MODEL}}}[$__rate_interval]))"),
                "{{code}}",
            ),
        ),
        lines(
            "Jobs taken over",
            "From processes that died.",
            "none",
            Query(or_none("sum(increase(elastic_jobs_recovered_total[$__rate_interval]))"), "jobs"),
        ),
        lines(
            "Errors of the job store",
            "By what was tried.",
            "none",
            Query(
                or_none("sum by (operation) (increase(elastic_store_errors_total[$__rate_interval]))"),
                "{{operation}}",
            ),
        ),
    ),
)


def dashboard(rows: tuple[Row, ...] = (NOW, REQUESTS, COMPUTE, BLOCKS, TROUBLE)) -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    top = 0
    for row in rows:
        heading = {
            "id": len(panels) + 1,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": _COLUMNS, "x": 0, "y": top},
            "panels": [],
        }
        panels.append(heading | ({"repeat": row.repeat} if row.repeat else {}))
        top += 1
        left = 0
        for panel in row.panels:
            if left + panel.width > _COLUMNS:
                left, top = 0, top + panel.height
            panels.append(_panel(panel, len(panels) + 1, left, top))
            left += panel.width
        top += row.panels[-1].height
    return {
        "uid": "elastic-dit",
        "title": "Elastic DiT",
        "description": "Written by deploy/grafana/dashboard.py.",
        "tags": ["elastic-dit"],
        "schemaVersion": SCHEMA_VERSION,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource_variable(), _model_variable()]},
        "annotations": {"list": []},
        "links": [],
        "panels": panels,
    }


def _panel(panel: Panel, panel_id: int, left: int, top: int) -> dict[str, Any]:
    defaults = {"unit": panel.unit, "min": 0, "custom": panel.custom, "color": {"mode": "palette-classic"}}
    return {
        "id": panel_id,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": {"h": panel.height, "w": panel.width, "x": left, "y": top},
        "fieldConfig": {
            "defaults": defaults if panel.maximum is None else defaults | {"max": panel.maximum},
            "overrides": list(panel.overrides),
        },
        "options": panel.options,
        "targets": [query.target(index) for index, query in enumerate(panel.queries)],
        "transformations": list(panel.transformations),
    }


def _datasource_variable() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}


def _model_variable() -> dict[str, Any]:
    query = "label_values(elastic_requests_running, model)"
    return {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "models", "qryType": 1},
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",  # refusals of unknown models have no model
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    OUT.write_text(text())
    print(f"{OUT} written")
