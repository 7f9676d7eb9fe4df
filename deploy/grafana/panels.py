"""Panels of Grafana's dashboard, and their layout as JSON.

The JSON of a panel is mostly layout and repetition. Here a panel is its title, its unit and its queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# The schema of Grafana 12. Newer versions read older schemas and migrate them in memory.
SCHEMA_VERSION = 41
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_COLUMNS = 24


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


def dashboard(rows: Sequence[Row]) -> dict[str, Any]:
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
