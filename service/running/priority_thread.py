"""A thread that makes calls one after the other, urgent ones first."""

from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from queue import PriorityQueue
from threading import Thread
from typing import TypeVar, TypeVarTuple

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

_URGENT, _OTHER, _LAST = range(3)


class PriorityThread:
    """Urgent calls, and the others, are made in the order of `submit`. It starts with the first call."""

    def __init__(self, name: str) -> None:
        self._calls: PriorityQueue[tuple[int, int, Callable[[], None]]] = PriorityQueue()
        self._numbers = count()
        self._is_closed = False
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def submit(
        self, is_urgent: bool, function: Callable[[*Arguments], Result], *arguments: *Arguments
    ) -> Future[Result]:
        """The result of `function`, or what it raises. The future is not to be cancelled."""
        future: Future[Result] = Future()

        def call() -> None:
            future.set_running_or_notify_cancel()
            try:
                result = function(*arguments)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._put(_URGENT if is_urgent else _OTHER, call)
        if self._thread.ident is None:
            self._thread.start()
        return future

    def close(self) -> None:
        """Return when all calls have been made. Nothing may be submitted any more."""

        def close() -> None:
            self._is_closed = True

        self._put(_LAST, close)
        if self._thread.ident is not None:
            self._thread.join()

    def _put(self, rank: int, call: Callable[[], None]) -> None:
        self._calls.put((rank, next(self._numbers), call))

    def _run(self) -> None:
        while not self._is_closed:
            _, _, call = self._calls.get()
            call()
            del call  # it holds its arguments and result, which must not wait for the next call
