import pytest

from service.errors import ResultExpired
from service.jobs.results import MemoryResults


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def results(clock: Clock) -> MemoryResults:
    return MemoryResults(ttl_s=10, max_bytes=100, clock=clock)


def test_result_is_kept_until_its_time_is_over(results: MemoryResults, clock: Clock) -> None:
    results.put("a", (b"one", b"two"))
    clock.now = 9.9
    assert results.get("a") == (b"one", b"two")
    clock.now = 10.0
    with pytest.raises(ResultExpired, match="10 s at most"):
        results.get("a")


def test_oldest_result_goes_first_when_there_is_too_much(results: MemoryResults) -> None:
    for name in ("a", "b", "c"):
        results.put(name, (bytes(40),))
    with pytest.raises(ResultExpired):
        results.get("a")
    assert results.get("b") == results.get("c") == (bytes(40),)
