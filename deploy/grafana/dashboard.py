"""Write Grafana's dashboard: `python deploy/grafana/dashboard.py`. A test compares the written file with this script.

The JSON of a panel is mostly layout and repetition. Here a panel is its title, its unit and its queries. The metrics
are declared in `service/metrics.py`.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "dashboards" / "elastic-dit.json"
# The schema of Grafana 12. Newer versions read older schemas and migrate them in memory.
SCHEMA_VERSION = 41
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
OF_MODEL = 'model=~"$model"'
_COLUMNS = 24
_RED, _AMBER, _GREEN, _BLUE = "semi-dark-red", "semi-dark-orange", "semi-dark-green", "semi-dark-blue"


@dataclass(frozen=True, slots=True)
class Query:
    """`legend` is a template over the series' labels. An instant query returns one table, other queries a series."""

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
    """Panels under a heading. `repeat` names a variable; the row is then drawn once per value."""

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
    """One line per block, with the means in a table."""
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
    """Of the decisions in computed steps."""

    def rate(matcher: str) -> str:
        return f"sum by (block) (rate(elastic_block_decisions_total{{{OF_MODEL}, {matcher}}}[$__rate_interval]))"

    return rate(f'decision="{decision}"') + " / " + rate('decision!="forecast"')


def median_and_p95(metric: str, *labels: str) -> tuple[Query, Query]:
    legend = " ".join(f"{{{{{label}}}}}" for label in labels)
    return (
        Query(quantile(0.5, metric, *labels), f"{legend} p50"),
        Query(quantile(0.95, metric, *labels), f"{legend} p95"),
    )


def or_none(expr: str) -> str:
    """`expr`, or zero. For series that begin with their first event, so that the panel does not say "No data"."""
    return f"{expr} or vector(0)"


# Every process reports the whole shared queue, so waiting is a maximum. Each reports its own running jobs, so running
# is a sum.
RUNNING = f"sum by (model) (elastic_requests_running{{{OF_MODEL}}})"
WAITING = f"max by (model) (elastic_requests_waiting{{{OF_MODEL}}})"
_ROWS_OF_BLOCKS = f"elastic_block_decisions_total{{{OF_MODEL}}}"

NOW = Row(
    "Now",
    (
        stat(
            "Requests a minute",
            "Requests that ended, with any status.",
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
            "Mean share of the dense model's block compute that an image or mesh took.",
            "percentunit",
            mean("elastic_compute_ratio"),
        ),
        stat(
            "Blocks left out",
            "Share of block decisions that were not run: skipped, re-used or forecast.",
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
            "From a request's arrival to its result. Budgets without a preset are grouped by their form.",
            "s",
            *median_and_p95("elastic_e2e_request_latency_seconds", "preset"),
        ),
        lines(
            "Time in the queue",
            "From a request's arrival until a worker claimed it.",
            "s",
            *median_and_p95("elastic_request_queue_time_seconds", "model"),
        ),
        lines(
            "Running and waiting",
            "All processes that share the queue.",
            "none",
            Query(RUNNING, "{{model}} running"),
            Query(WAITING, "{{model}} waiting"),
        ),
        lines(
            "Stages",
            "Mean time that an image or mesh spends in each stage.",
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
            "Requests with a deadline by outcome, and requests whose quality was lowered as their min_quality allows.",
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
            "Share of the dense model's block compute that images and meshes took. One in ten takes more than p90.",
            "percentunit",
            Query(mean("elastic_compute_ratio", "model"), "{{model}} mean"),
            Query(quantile(0.9, "elastic_compute_ratio", "model"), "{{model}} p90"),
            maximum=1,
            width=6,
        ),
        lines(
            "Denoise steps",
            "Of images and meshes. Forecast steps run nothing of the model.",
            "none",
            Query(
                f"sum by (model, decision) (rate(elastic_steps_total{{{OF_MODEL}}}[$__rate_interval]))",
                "{{model}} {{decision}}",
            ),
            width=6,
        ),
        lines(
            "Error of the predicted compute ratio",
            "Difference between the counted compute ratio and the calibration's. If it stays high, calibrate again "
            "with prompts like the current ones.",
            "percentunit",
            Query(mean("elastic_predicted_compute_ratio_error", "model"), "{{model}} mean"),
            Query(quantile(0.95, "elastic_predicted_compute_ratio_error", "model"), "{{model}} p95"),
            width=6,
        ),
        lines(
            "Batch size",
            "Mean number of images or meshes that shared a computed step.",
            "none",
            Query(mean("elastic_generation_batch_size", "model"), "{{model}}"),
            width=6,
        ),
        lines(
            "Computed step",
            "Time of one computed step of a batch.",
            "s",
            *median_and_p95("elastic_step_latency_seconds", "model"),
        ),
        lines(
            "Routers",
            "Share of a step's time spent in routers.",
            "percentunit",
            Query(
                ratio("elastic_router_latency_seconds_sum", "elastic_step_latency_seconds_sum", "model"), "{{model}}"
            ),
        ),
        lines(
            "Compiled graphs",
            "Those that steps compiled, with ELASTIC_COMPILE: requests waited for them. There should be none.",
            "none",
            Query(
                or_none(
                    f"sum by (model, kind) (increase(elastic_compiled_graphs_total{{{OF_MODEL}}}[$__rate_interval]))"
                ),
                "{{model}} {{kind}}",
            ),
        ),
        lines(
            "GPU memory",
            "Empty on a CPU.",
            "bytes",
            Query(or_none("sum by (instance, kind) (elastic_gpu_memory_bytes)"), "{{instance}} {{kind}}"),
        ),
        lines(
            "Prompts",
            "Found in the cache (hit), or encoded (miss).",
            "cps",
            Query(
                f"sum by (model, outcome) (rate(elastic_prompts_total{{{OF_MODEL}}}[$__rate_interval]))",
                "{{model}} {{outcome}}",
            ),
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
            "Share of rows that each block ran, re-used, skipped and left to forecasts in the selected time range.",
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
            overrides=(
                _coloured("run", _RED),
                _coloured("reuse", _AMBER),
                _coloured("skip", _GREEN),
                _coloured("forecast", _BLUE),
            ),
            transformations=(
                {
                    "id": "groupingToMatrix",
                    "options": {"rowField": "block", "columnField": "decision", "valueField": "Value"},
                },
            ),
        ),
        Panel(
            "Block latency",
            "Distribution of the time of one block in one step of a batch, over all blocks.",
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
            "Share of rows in computed steps that skip the block.",
            "percentunit",
            share_of_decision("skip"),
            maximum=1,
        ),
        lines_by_block(
            "Re-use rate by block",
            "Share of rows in computed steps that re-use the block's residual of an earlier one.",
            "percentunit",
            share_of_decision("reuse"),
            maximum=1,
        ),
        lines_by_block(
            "Latency by block, p95",
            "Time of the block in one step of a batch. Skipped rows take no time, so it falls with the skip rate.",
            "s",
            quantile(0.95, "elastic_block_latency_seconds", "block"),
        ),
        lines_by_block(
            "MLP width by block",
            "Mean width over the rows that run the block.",
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
            "By error code. Until the first refusal there is an unnamed line at zero.",
            "reqps",
            Query(
                or_none(f"sum by (code) (rate(elastic_requests_rejected_total{{{OF_MODEL}}}[$__rate_interval]))"),
                "{{code}}",
            ),
        ),
        lines(
            "Recovered jobs",
            "Jobs requeued after their process died.",
            "none",
            Query(or_none("sum(increase(elastic_jobs_recovered_total[$__rate_interval]))"), "jobs"),
        ),
        lines(
            "Errors of the job store",
            "By operation.",
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
        "allValue": ".*",  # refusals of unknown models have an empty model label
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    OUT.write_text(text())
    print(f"{OUT} written")
