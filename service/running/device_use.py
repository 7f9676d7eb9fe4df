"""Who uses the device's memory: several threads at once, or, after one has run out of memory, that one alone."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition
from typing import TypeVar

from models.errors import OutOfDeviceMemory

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class DeviceUse:
    """Steps, encoding, decoding and previews hold memory for a moment. Together they can need more than there is.

    A thread must not use it within a use of its own.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._num_using = 0
        self._num_alone = 0  # uses that go on alone, or wait for that

    def call(self, function: Callable[[], Result]) -> Result:
        """What `function` returns. If it runs out of memory, it is called again while nobody else uses the device."""
        try:
            with self.shared():
                return function()
        except OutOfDeviceMemory as error:
            logger.warning("%s; it is tried again alone", error)
        with self.alone():
            return function()

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._num_alone)
            self._num_using += 1
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._num_alone += 1
            self._changed.wait_for(lambda: not self._num_using)
            self._num_using += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_alone -= 1
            self._leave()

    def _leave(self) -> None:
        with self._changed:
            self._num_using -= 1
            self._changed.notify_all()
