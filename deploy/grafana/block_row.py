"""The row of a model's blocks, which is drawn once for each model."""

from typing import Any

from panels import Panel, Query, Row, lines_by_block
from queries import BLOCK_DECISIONS, OF_MODEL, mean, quantile, share_of_decision

_RED, _AMBER, _GREEN, _BLUE = "semi-dark-red", "semi-dark-orange", "semi-dark-green", "semi-dark-blue"


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
                    f"sum by (block, decision) (increase({BLOCK_DECISIONS}[$__range]))"
                    f" / on (block) group_left () sum by (block) (increase({BLOCK_DECISIONS}[$__range]))",
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
