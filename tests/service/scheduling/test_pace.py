import pytest

from service.scheduling.pace import Pace


def test_pace_is_the_busy_time_over_the_predicted_one() -> None:
    pace = Pace()
    assert pace.ratio == 1.0
    pace.begin(100.0)
    pace.advance(1.0, 102.0)
    assert pace.ratio == pytest.approx(2.0)
    pace.begin(200.0)  # idle since 102
    pace.advance(1.0, 204.0)
    assert 2.9 < pace.ratio < 3.2


def test_recent_work_decides() -> None:
    pace = Pace()
    pace.begin(0.0)
    pace.advance(100.0, 100.0)
    for second in range(101, 501):
        pace.advance(0.1, second)
    assert pace.ratio == pytest.approx(10.0, rel=0.1)


@pytest.mark.parametrize("batch", [1, 8])
def test_jobs_that_run_together_share_the_time(batch: int) -> None:
    pace = Pace()
    pace.begin(0.0)
    for end in range(10, 1010, 10):
        for _ in range(batch):
            pace.advance(10.0, end)
    assert pace.ratio == pytest.approx(1 / batch, rel=0.2)


def test_cancelled_jobs_leave_no_other_trace_than_their_time() -> None:
    pace = Pace()
    pace.begin(0.0)
    pace.advance(10.0, 10.0)
    for number in range(10_000):
        pace.advance(0.0, 10.0 + number / 1e6)
    assert pace.ratio == pytest.approx(1.0, rel=0.01)
