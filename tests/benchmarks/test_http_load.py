import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.http_load.clients import NO_ANSWER, Call, call_at_times, call_in_turn
from benchmarks.http_load.contenders import exact_steps
from benchmarks.http_load.mix import (
    KINDS,
    SMALL,
    burst_arrivals,
    exact_tasks,
    mixed_tasks,
    percentile,
    poisson_arrivals,
    without_deadlines,
)
from benchmarks.http_load.stock_server import Batcher, Batching, ImageBody, Pipelines, StockModel, png_of
from benchmarks.http_load.stock_server import Call as StockCall
from benchmarks.http_load.summary import budget_rows, load_row, quality_row
from benchmarks.http_load.ungrouped_server import in_turns
from service.scheduling import precedence
from service.scheduling.batching import Candidate
from service.scheduling.cost import BlockSeconds

PROMPTS = {kind.model: [f"{kind.model} {number}" for number in range(3)] for kind in KINDS}
BARE_S = dict.fromkeys(KINDS, 2.0)


def test_every_ten_requests_have_the_shares_of_the_mix() -> None:
    tasks = mixed_tasks(PROMPTS, 50, seed=3)
    assert tasks == mixed_tasks(PROMPTS, 50, seed=3) != mixed_tasks(PROMPTS, 50, seed=4)
    for first in range(0, 50, 10):
        deck = tasks[first : first + 10]
        assert sum(task.kind == SMALL for task in deck) == 8
        assert {task.kind for task in deck} == {*KINDS}
        assert sum(task.allowance is not None for task in deck) == 1
    assert sum(task.allowance is not None for task in mixed_tasks(PROMPTS, 10, seed=3, num_deadlines=4)) == 4
    budgets = Counter(task.budget for task in without_deadlines(tasks))
    assert budgets["default"] >= 20
    assert 15 <= budgets["high"] + budgets["fast"] <= 20
    assert not any(task.allowance for task in without_deadlines(tasks))


def test_body_has_a_preset_or_a_deadline_or_no_budget() -> None:
    bodies = {task.budget: task.body(BARE_S) for task in mixed_tasks(PROMPTS, 30, seed=1)}
    assert "budget" not in bodies["default"]
    assert bodies["exact"]["budget"] == {"preset": "exact"}
    assert 800 <= bodies["deadline"]["budget"]["latency_ms"] <= 8000
    assert exact_tasks(PROMPTS, 1)[0].body({})["size"] == "128x128"


def test_arrivals_have_their_rate() -> None:
    times = poisson_arrivals(5.0, 400.0, seed=1)
    assert times == sorted(times)
    assert len(times) == pytest.approx(2000, rel=0.1)
    assert burst_arrivals(2.0, 10.0, 8) == [0.0] * 8 + [4.0] * 8 + [8.0] * 8


def test_percentile_is_a_value_that_the_share_does_not_exceed() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 0.95) == 4.0
    assert percentile([], 0.5) is None


def entry(status: int, seconds: float, **more: Any) -> dict[str, Any]:
    return {"status": status, "seconds": seconds, "latency_s": None, "second_status": None, "budget": "fast"} | more


def test_row_of_a_load_counts_deadlines_refusals_and_second_calls() -> None:
    answers = [
        entry(200, 1.0, latency_s=2.0),
        entry(200, 3.0, latency_s=2.0),
        entry(500, 0.1, latency_s=2.0),
        entry(422, 0.01, latency_s=2.0),
        entry(503, 0.02, second_status=200),
        entry(503, 0.03, second_status=503),
    ]
    row = load_row(answers)
    assert (row["requests"], row["failed"], row["deadlines"], row["retried"]) == (6, 1, 3, 2)
    assert (row["refused"], row["met"], row["second_ok"]) == pytest.approx((0.5, 1 / 3, 0.5))
    assert budget_rows(answers) == [{"budget": "fast", "p50_s": 1.0, "p95_s": 3.0}]


def test_row_of_quality_says_how_many_promises_were_kept() -> None:
    samples = [{"similarity": similarity, "promised": 0.9} for similarity in (0.95, 0.85)]
    row = quality_row(samples)
    assert (row["quality"], row["quality_p10"], row["kept"]) == pytest.approx((0.9, 0.85, 0.5))
    assert quality_row([{"similarity": 1.0, "promised": None}])["kept"] is None


class CountingPipelines(Pipelines):
    """Makes an empty picture after `seconds`, and notes the prompts of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self._models = {"m": exact_steps(StockModel("", 3.0, 40, {"exact": 4, "draft": 2, "default": 2}))}

    def images(self, call: StockCall, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        self.calls.append((*prompts,))
        return [Image.new("RGB", (8, 8)) for _ in prompts]


def test_batcher_makes_equal_requests_in_one_call_and_others_apart() -> None:
    pipelines = CountingPipelines()
    batcher = Batcher(pipelines, Batching(window_s=0.2, max_size=2))
    sizes = {"a": "8x8", "b": "8x8", "other size": "16x16", "c": "8x8"}
    files = [batcher.submit(ImageBody(model="m", prompt=name, size=size, seed=1)) for name, size in sizes.items()]
    assert {file.result(10) for file in files} == {png_of(Image.new("RGB", (8, 8)))}
    assert pipelines.calls == [("a", "b"), ("other size",), ("c",)]


@contextmanager
def http_server(answer: Callable[[Any], tuple[int, dict[str, str]]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, headers = answer(body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "4"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"file")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_arrivals_do_not_wait_for_answers() -> None:
    second_is_here = threading.Event()

    def answer(body: Any) -> tuple[int, dict[str, str]]:
        if body["seed"] == 0:
            assert second_is_here.wait(10)
        second_is_here.set()
        return 200, {}

    with http_server(answer) as url:
        calls = [Call(0, {"seed": 0}, keeps_file=True), Call(1, {"seed": 1}, at=0.05)]
        answers = call_at_times(url, calls)
    assert [(answer.number, answer.status, answer.file) for answer in answers] == [(0, 200, b"file"), (1, 200, None)]


def test_refused_clients_come_back_once_after_the_time_they_are_told() -> None:
    times: list[float] = []

    def answer(_: Any) -> tuple[int, dict[str, str]]:
        times.append(time.monotonic())
        receipt = {"quality_applied": 0.9, "degraded": False, "deadline_met": None, "rule": "dense"}
        return (503, {"Retry-After": "1"}) if len(times) == 1 else (200, {"X-Receipt": json.dumps(receipt)})

    with http_server(answer) as url:
        (refused,) = call_at_times(url, [Call(0, {"seed": 0})])
        (made,) = call_in_turn(url, [Call(1, {"seed": 1})], 4)
    assert (refused.status, refused.retry_after_s, refused.second_status) == (503, 1.0, 200)
    assert times[1] - times[0] >= 1
    assert made.receipt == {"quality_applied": 0.9, "degraded": False, "deadline_met": None}


def test_closed_loop_stops_at_a_refusal() -> None:
    with http_server(lambda _: (503, {"Retry-After": "1"})) as url, pytest.raises(RuntimeError, match="answered 503"):
        call_in_turn(url, [Call(0, {"seed": 0})], 1)


def test_broken_connection_counts_as_a_failed_answer() -> None:
    with http_server(lambda _: (200, {})) as url:
        pass
    (answer,) = call_at_times(url, [Call(0, {"seed": 0})])
    assert answer.status == NO_ANSWER
    assert load_row([entry(answer.status, answer.seconds)])["failed"] == 1


def candidate(batch_key: str, virtual_time: float, runs: float) -> Candidate:
    return Candidate(batch_key, virtual_time, [runs] * 4, BlockSeconds(0.1, 0.1))


def test_without_scheduling_all_that_can_share_a_step_do_and_the_others_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precedence, "form_groups", in_turns())
    order = precedence.Precedence()
    large, dense, light = candidate("large", 9.0, 1.0), candidate("small", 0.0, 1.0), candidate("small", 5.0, 0.1)
    turns = [order.groups([large, dense, light], now=0.0) for _ in range(3)]
    assert [groups[0] for groups in turns] == [[0], [1, 2], [0]]
    assert order.groups([dense, light], now=0.0) == [[0, 1]]


def test_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra 'peers'")
    from benchmarks.http_load.plot import draw

    latency = {"contender": "ours", "level": 0.9, "pattern": "poisson", "budget": "fast", "p50_s": 1.0, "p95_s": 2.0}
    result = {
        "saturation": [{"contender": "ours", "load": "mix", "per_s": 2.0}],
        "quality": [{"contender": "ours", "quality": 0.9}],
        "latencies": [latency],
    }
    draw(tmp_path / "plot.svg", result)
    assert (tmp_path / "plot.svg").stat().st_size > 1000
