"""From answers to the rows of tables."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.http_load.mix import percentile
from benchmarks.table import TableRow

_REFUSED = (422, 429, 503)
_TENTH = 0.1

Entry = Mapping[str, Any]


def load_row(answers: Sequence[Entry]) -> TableRow:
    """Shares of one run under an open load. Deadlines are those of the answers that were not refused.

    A deadline is met if the client has the answer in time. `second_ok` is the share of those that waited for
    `Retry-After` once and then got their answer.
    """
    admitted = [entry for entry in answers if entry["status"] not in _REFUSED]
    refused_s = [entry["seconds"] for entry in answers if entry["status"] in _REFUSED]
    seconds = [entry["seconds"] for entry in admitted]
    with_deadline = [entry for entry in admitted if entry["latency_s"] is not None]
    second = [entry["second_status"] for entry in answers if entry["second_status"] is not None]
    return {
        "requests": len(answers),
        "failed": sum(entry["status"] != 200 for entry in admitted),
        "p50_s": percentile(seconds, 0.5),
        "p95_s": percentile(seconds, 0.95),
        "refused": len(refused_s) / len(answers),
        "refused_p95_s": percentile(refused_s, 0.95),
        "deadlines": len(with_deadline),
        "met": _share([entry["status"] == 200 and entry["seconds"] <= entry["latency_s"] for entry in with_deadline]),
        "retried": len(second),
        "second_ok": _share([status == 200 for status in second]),
    }


def budget_rows(answers: Sequence[Entry]) -> list[TableRow]:
    """Latency of each budget."""
    budgets = dict.fromkeys(entry["budget"] for entry in answers)
    rows: list[TableRow] = []
    for budget in sorted(budgets):
        seconds = [entry["seconds"] for entry in answers if entry["budget"] == budget and entry["status"] == 200]
        rows.append({"budget": budget, "p50_s": percentile(seconds, 0.5), "p95_s": percentile(seconds, 0.95)})
    return rows


def quality_row(samples: Sequence[Entry]) -> TableRow:
    """Similarity to the exact results. `kept` is the share of samples that reach what the receipt promised."""
    similarities = [sample["similarity"] for sample in samples]
    promises = [
        sample["similarity"] >= sample["promised"] - 1e-9 for sample in samples if sample["promised"] is not None
    ]
    return {
        "samples": len(samples),
        "quality": statistics.mean(similarities) if similarities else None,
        "quality_p10": percentile(similarities, _TENTH),
        "kept": _share(promises),
    }


def _share(outcomes: Sequence[bool]) -> float | None:
    return sum(outcomes) / len(outcomes) if outcomes else None
