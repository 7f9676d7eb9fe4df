"""Changes of an engine's models, which other threads ask for and the worker's thread makes."""

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from models.errors import DeviceLost
from service.errors import Draining
from service.running.device_use import DeviceUse

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine


class _Change(NamedTuple):
    make: "Callable[[Engine], None]"
    done: Future[None]


class EngineChanges:
    """Any thread may call this, but for `make`."""

    def __init__(self) -> None:
        self._asked: SimpleQueue[_Change] = SimpleQueue()
        self._lock = Lock()  # so that nothing is asked for after `refuse`
        self._is_over = False

    def ask(self, change: "Callable[[Engine], None]") -> Future[None]:
        """Let `change` add or remove models. The future has what it raises."""
        asked = _Change(change, Future())
        with self._lock:
            if self._is_over:
                asked.done.set_exception(_refusal())
            else:
                self._asked.put(asked)
        return asked.done

    def make(self, engine: "Engine", device: DeviceUse, *, on_change: "Callable[[Engine], None]") -> None:
        """Make the changes that were asked for, each with the device to itself: a new model is measured.

        Raises DeviceLost.
        """
        while (asked := self._next()) is not None:
            try:
                with device.alone():
                    asked.make(engine)
                on_change(engine)
            except Exception as error:
                asked.done.set_exception(error)
                if isinstance(error, DeviceLost):
                    raise
            else:
                asked.done.set_result(None)

    def refuse(self) -> None:
        """Fail those that were asked for and all later ones: the worker has ended."""
        with self._lock:
            self._is_over = True
        while (asked := self._next()) is not None:
            asked.done.set_exception(_refusal())

    def _next(self) -> _Change | None:
        """The next change whose caller still waits for it."""
        with suppress(Empty):
            while True:
                if (asked := self._asked.get_nowait()).done.set_running_or_notify_cancel():
                    return asked
        return None


def _refusal() -> Draining:
    return Draining("the worker has ended", retry_after_s=1)
