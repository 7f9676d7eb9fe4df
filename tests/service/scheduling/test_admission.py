import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Overloaded
from service.scheduling.admission import admit

seconds = st.floats(min_value=0.01, max_value=1e6)


def test_full_server_says_when_to_come_back() -> None:
    with pytest.raises(
        Overloaded, match=r"55\.0 s of work.*would add 10\.0 s.*60 s it accepts; try again in 5 s"
    ) as caught:
        admit(10, backlog_s=55, max_backlog_s=60)
    assert caught.value.retry_after_s == 5


def test_idle_server_takes_any_job() -> None:
    admit(1000, backlog_s=0, max_backlog_s=60)


@given(cost_s=seconds, backlog_s=seconds, max_backlog_s=seconds)
def test_after_the_wait_the_job_is_admitted(cost_s: float, backlog_s: float, max_backlog_s: float) -> None:
    retry_after_s = 0
    try:
        admit(cost_s, backlog_s=backlog_s, max_backlog_s=max_backlog_s)
    except Overloaded as error:
        retry_after_s = error.retry_after_s or 0
    admit(cost_s, backlog_s=max(0.0, backlog_s - retry_after_s), max_backlog_s=max_backlog_s)
