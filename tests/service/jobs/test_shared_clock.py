import pytest

from service.jobs.shared_clock import SharedClock


class Local:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("skew_s", [-500.0, 0.0, 500.0])
def test_clock_is_within_the_time_that_the_answer_took(skew_s: float) -> None:
    local = Local()
    clock = SharedClock(local)
    for wait_s in (3.0, 0.1, 9.0):
        asked_at = local.now
        local.now += wait_s / 2
        shared = local.now + skew_s
        local.now += wait_s / 2
        clock.adjust(shared, asked_at=asked_at)
    assert clock() == pytest.approx(local.now + skew_s, abs=0.05)


def test_clock_that_agrees_is_not_moved() -> None:
    local = Local()
    clock = SharedClock(local)
    asked_at = local.now
    local.now += 4.0
    clock.adjust(local.now - 0.5, asked_at=asked_at)
    assert clock() == local.now


def test_clock_is_local_until_the_first_answer() -> None:
    assert SharedClock(Local())() == 1000.0
