"""What a run of the memory benchmark counts as a leak."""

from collections.abc import Sequence

import pytest

from benchmarks.memory import LIMITS, judge, num_unfinished
from benchmarks.table import TableRow


def rows(values: Sequence[float]) -> list[TableRow]:
    return [{"jobs": 50 * number, "process": value} for number, value in enumerate(values, 1)]


def test_steady_rise_above_the_limit_is_a_leak() -> None:
    per_job = 2 * LIMITS["process"]
    slopes, faults = judge(rows([1e9 + per_job * 50 * number for number in range(6)]))
    assert slopes["process"] == pytest.approx(per_job)
    assert len(faults) == 1


@pytest.mark.parametrize(
    "values",
    [[1e9] * 6, [1e9, 1e9, 1e9, 1.004e9, 1e9, 1.002e9], [1e9 + 0.5 * LIMITS["process"] * 50 * n for n in range(6)]],
)
def test_noise_and_a_slow_rise_are_no_leak(values: Sequence[float]) -> None:
    assert judge(rows(values))[1] == []


def test_unfinished_jobs_are_counted_over_models() -> None:
    metrics = """# HELP elastic_requests_running x
elastic_requests_running{model="a"} 2.0
elastic_requests_running{model="b"} 0.0
elastic_requests_waiting{model="a"} 1.0
elastic_requests_total{model="a",status="succeeded"} 7.0
"""
    assert num_unfinished(metrics) == 3
