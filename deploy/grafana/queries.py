"""Queries that panels share, in PromQL. The metrics are declared in `service/metrics.py`."""

from panels import Query

OF_MODEL = 'model=~"$model"'


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


# Every process reports the whole shared queue and all workers, so these are maxima. Each reports its own running jobs,
# so that is a sum.
RUNNING = f"sum by (model) (elastic_requests_running{{{OF_MODEL}}})"
WAITING = f"max by (model) (elastic_requests_waiting{{{OF_MODEL}}})"
BACKLOG = f"max by (model) (elastic_backlog_seconds{{{OF_MODEL}}})"
WANTED_WORKERS = f"max by (model) (elastic_wanted_workers{{{OF_MODEL}}})"
WORKERS_BY_STATE = f"max by (model, state) (elastic_workers{{{OF_MODEL}}})"
LIVING_WORKERS = f'sum by (model) (max by (model, state) (elastic_workers{{{OF_MODEL}, state!="draining"}}))'
BLOCK_DECISIONS = f"elastic_block_decisions_total{{{OF_MODEL}}}"
