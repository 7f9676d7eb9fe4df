"""What the decisions of scheduling lead to under load, by `benchmarks.simulation`. Together some 10,000 calls."""

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.simulation import Arrival, Outcome, Server, capacity, poisson, request_of
from models.curve import Preset
from models.request import ImageRequest, LatencyBudget, PresetBudget
from service.jobs.job import Priority

EXACT, HIGH, BALANCED, FAST, DRAFT = (request_of(PresetBudget(preset)) for preset in Preset)
MIX = [EXACT, EXACT, FAST, DRAFT]
IN_TIME = [request_of(LatencyBudget(latency_s, min_quality=0.8)) for latency_s in (2, 5, 10, 20)]


@pytest.fixture(scope="module")
def at_load() -> Callable[..., list[Arrival]]:
    """Calls at a multiple of what the server can do."""
    per_second = capacity(MIX)

    def at_load(load: float, num_calls: int, requests: Sequence[ImageRequest] = MIX, **fields: Any) -> list[Arrival]:
        rate = load * per_second
        return poisson(requests, rate, num_calls / rate, **{"seed": 1, **fields})

    return at_load


def seconds_of(outcomes: Sequence[Outcome], request: ImageRequest) -> float:
    return mean(outcome.seconds for outcome in outcomes if outcome.job and outcome.arrival.request == request)


_calls = st.lists(
    st.builds(
        Arrival,
        st.floats(0, 60),
        st.sampled_from([EXACT, HIGH, FAST, DRAFT, request_of(PresetBudget(Preset.EXACT), side=128), *IN_TIME]),
        st.sampled_from(["a", "b"]),
        st.sampled_from([0.5, 1.0, 10.0]),
        st.sampled_from([Priority.NORMAL, Priority.NORMAL, Priority.LOW]),
    ),
    min_size=1,
    max_size=80,
)


@settings(max_examples=20)
@given(_calls)
def test_every_admitted_request_ends_within_its_bound(calls: list[Arrival]) -> None:
    """Once nobody who comes later comes first, what is before a job is at most the longest backlog."""
    longest_s = 20.0
    for outcome in Server(max_backlog_s=longest_s).serve(calls):
        if outcome.job is None:
            assert outcome.retry_after_s or outcome.is_unreachable
        elif outcome.arrival.priority is Priority.NORMAL:
            assert outcome.job.due_at is not None
            patience_s = outcome.job.due_at - outcome.job.created_at
            # The clock differs from predictions by up to a fifth, and others share the device at the end.
            assert outcome.seconds <= 1.2 * (patience_s + 2 * longest_s + outcome.job.predicted_seconds)
        assert outcome.job is None or outcome.ended_at is not None


@pytest.mark.parametrize("load", [0.9, 1.5])
def test_light_requests_feel_light_beside_exact_ones(load: float, at_load: Callable[..., list[Arrival]]) -> None:
    calls = at_load(load, 700)
    ours, turns = Server(max_backlog_s=30), Server(max_backlog_s=30, takes_turns=True)
    served, served_in_turns = ours.serve(calls), turns.serve(calls)
    for request in (FAST, DRAFT):
        assert seconds_of(served, request) < 0.6 * seconds_of(served_in_turns, request)
    # At equal throughput
    per_second = [
        sum(o.job is not None for o in of) / server.now for server, of in ((ours, served), (turns, served_in_turns))
    ]
    assert per_second[0] > 0.95 * per_second[1]


@pytest.mark.parametrize(("load", "share"), [(0.9, 0.99), (1.5, 0.98)])
def test_admitted_deadlines_are_met_and_others_are_refused_at_once(
    load: float, share: float, at_load: Callable[..., list[Arrival]]
) -> None:
    outcomes = Server(max_backlog_s=30).serve(at_load(load, 1500, [EXACT, BALANCED, FAST, DRAFT, *IN_TIME]))
    promised = [outcome for outcome in outcomes if outcome.job and outcome.job.deadline_at is not None]
    assert len(promised) > 400
    assert mean(outcome.is_in_time for outcome in promised) >= share
    assert all(outcome.job or outcome.is_unreachable or outcome.retry_after_s for outcome in outcomes)


@pytest.mark.parametrize("load", [0.5, 0.9])
def test_tight_deadlines_are_met_too(load: float) -> None:
    """The mix of `benchmarks.http_load`, with deadlines down to what the lowest quality takes on an idle server."""
    tight = [request_of(LatencyBudget(1.5 * 10 ** (n / 20), min_quality=0.8)) for n in range(-8, 13)]
    others = [EXACT, HIGH, HIGH, BALANCED, BALANCED, BALANCED, FAST, FAST, DRAFT]
    rate = load * capacity(others)
    outcomes = Server(max_backlog_s=50).serve(poisson([*others * 5, *tight], rate, 3000 / rate, seed=1))
    asked = [outcome for outcome in outcomes if isinstance(outcome.arrival.request.budget, LatencyBudget)]
    promised = [outcome for outcome in asked if outcome.job is not None]
    assert len(promised) > 0.6 * len(asked)
    assert mean(outcome.is_in_time for outcome in promised) >= 0.99


@pytest.mark.parametrize("deadlines", [[0.8], [2.0], [10.0, 30.0]])
def test_more_deadlines_than_can_be_met_do_not_stop_the_others(deadlines: list[float]) -> None:
    asked = [request_of(LatencyBudget(latency_s, min_quality=0.8)) for latency_s in deadlines]
    rate = 3.0 * capacity([DRAFT])
    others = [Arrival(10.0 * number, EXACT) for number in range(1, 11)]
    calls = sorted([*poisson(asked, rate, 300.0, seed=1), *others], key=lambda call: call.at)
    outcomes = Server(max_backlog_s=60).serve(calls)
    promised = [outcome for outcome in outcomes if outcome.job and outcome.job.deadline_at is not None]
    assert len(promised) > 100
    assert mean(outcome.is_in_time for outcome in promised) >= 0.98
    waiting = [outcome for outcome in outcomes if outcome.arrival.request == EXACT]
    assert all(outcome.ended_at is not None and outcome.ended_at < 300.0 for outcome in waiting)


def test_overloading_keys_share_by_weight_and_a_light_key_keeps_its_latency(
    at_load: Callable[..., list[Arrival]],
) -> None:
    light = at_load(0.05, 40, seed=3, owner="light")
    calls = sorted(
        [
            *at_load(1.0, 800, seed=1, owner="a"),
            *at_load(1.0, 800, seed=2, owner="b", weight=2.0),
            *light,
        ],
        key=lambda call: call.at,
    )
    outcomes = Server(max_backlog_s=60).serve(calls)
    admitted = {
        owner: [outcome for outcome in outcomes if outcome.job and outcome.arrival.owner == owner] for owner in "ab"
    }
    work = {
        owner: sum(outcome.job.predicted_seconds for outcome in of if outcome.job) for owner, of in admitted.items()
    }
    assert work["b"] / work["a"] == pytest.approx(2.0, rel=0.2)
    of_light = [outcome for outcome in outcomes if outcome.job and outcome.arrival.owner == "light"]
    assert len(of_light) >= 0.9 * len(light)
    alone = Server().serve(light)
    assert mean(o.seconds for o in of_light) < 4 * mean(o.seconds for o in alone)
    assert mean(o.seconds for o in of_light) < 0.2 * mean(o.seconds for o in admitted["a"])


def test_one_key_alone_fills_most_of_the_backlog_and_without_keys_all_of_it(
    at_load: Callable[..., list[Arrival]],
) -> None:
    served = [
        sum(outcome.job is not None for outcome in Server(max_backlog_s=20).serve(at_load(3.0, 200, owner=owner)))
        for owner in ("a", None)
    ]
    assert 0.75 * served[1] < served[0] < served[1]


def test_waiting_as_long_as_told_suffices_after_a_surge(at_load: Callable[..., list[Arrival]]) -> None:
    surge = at_load(1.5, 110)
    later = [Arrival(surge[-1].at + call.at, call.request) for call in at_load(0.7, 300, seed=2)]
    outcomes = Server(max_backlog_s=30, num_retries=1).serve([*surge, *later])
    refused = [outcome for outcome in outcomes if outcome.num_refusals]
    assert len(refused) > 10
    assert mean(outcome.job is not None for outcome in refused) >= 0.85
