from dataclasses import replace

import pytest

from service.scheduling.batching import Candidate
from service.scheduling.cost import BlockSeconds
from service.scheduling.precedence import Precedence


def candidate(*, is_high: bool = False, turn: float = 0.0, seconds: float = 1.0, key: str = "a") -> Candidate:
    weight = 256.0 if is_high else 1.0
    return Candidate(key, turn, [1.0], BlockSeconds(0.2 * seconds, 0.8 * seconds), weight, is_high)


def leaders(precedence: Precedence, candidates: list[Candidate], num_steps: int, now: float = 0.0) -> list[int]:
    """Who leads each step, where a step is as long as its leader's alone."""
    result = []
    for _ in range(num_steps):
        leader = precedence.groups(candidates, now)[0][0]
        precedence.spend(candidates[leader].is_high, candidates[leader].step_seconds)
        result.append(leader)
    return result


def test_high_priority_leads_whatever_it_has_had() -> None:
    rivals = [candidate(), candidate(is_high=True, turn=100.0)]
    assert leaders(Precedence(), rivals, 15) == [1] * 15


@pytest.mark.parametrize("seconds", [0.1, 1.0, 10.0])
def test_others_get_a_twentieth_and_never_more_at_once_than_they_are_owed(seconds: float) -> None:
    rivals = [candidate(seconds=seconds), candidate(is_high=True)]
    turns = leaders(Precedence(), rivals, 2000)
    had = turns.count(0) * seconds
    assert had / turns.count(1) == pytest.approx(0.05, rel=0.15)
    assert turns.index(0) == pytest.approx(20 * seconds, abs=1)


def test_nothing_is_owed_to_those_who_did_not_wait() -> None:
    precedence = Precedence()
    leaders(precedence, [candidate(is_high=True)], 1000)
    assert leaders(precedence, [candidate(), candidate(is_high=True)], 15) == [1] * 15
    leaders(precedence, [candidate()], 1)
    assert not precedence.are_owed(0.5)


def test_those_without_a_deadline_get_a_twentieth_beside_those_that_have_one() -> None:
    precedence = Precedence()
    rivals = [candidate(turn=1.0, seconds=0.5), replace(candidate(key="b"), slack_s=0.0)]
    led = []
    for _ in range(2000):
        led.append(precedence.groups(rivals, 0.0)[0][0])
        precedence.spend(False, rivals[led[-1]].step_seconds, has_deadline=led[-1] == 1)
    assert led.count(0) * 0.5 / led.count(1) == pytest.approx(0.05, rel=0.15)
    assert led.index(0) == pytest.approx(10, abs=1)
    # Nothing is owed to those who did not wait
    precedence.groups(rivals[1:], 0.0)
    assert precedence.groups(rivals, 0.0)[0] == [1]


def test_steps_are_short_while_high_priority_comes() -> None:
    precedence, alike = Precedence(), [candidate() for _ in range(4)]
    assert precedence.groups(alike, 0.0) == [[0, 1, 2, 3]]
    precedence.groups([*alike, candidate(is_high=True, key="b")], 10.0)
    assert precedence.groups(alike, 39.0) == [[0], [1], [2], [3]]
    assert precedence.groups(alike, 41.0) == [[0, 1, 2, 3]]
