from collections.abc import Iterator
from threading import Event

import pytest

from service.running.priority_thread import PriorityThread

TIMEOUT_S = 20


@pytest.fixture
def thread() -> Iterator[PriorityThread]:
    thread = PriorityThread("test")
    yield thread
    thread.close()


def test_urgent_calls_come_first_and_the_rest_in_order(thread: PriorityThread) -> None:
    gate, made = Event(), list[int]()
    thread.submit(False, gate.wait, TIMEOUT_S)
    for number, is_urgent in enumerate((False, True, False, True)):
        thread.submit(is_urgent, made.append, number)
    gate.set()
    thread.close()
    assert made == [1, 3, 0, 2]


def test_results_and_errors_arrive(thread: PriorityThread) -> None:
    assert thread.submit(False, divmod, 7, 2).result(TIMEOUT_S) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        thread.submit(True, divmod, 7, 0).result(TIMEOUT_S)
    assert thread.submit(False, divmod, 9, 2).result(TIMEOUT_S) == (4, 1)


def test_thread_without_calls_can_be_closed() -> None:
    PriorityThread("test").close()
