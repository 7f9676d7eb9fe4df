"""One clock for all servers and workers that share a Redis: that of Redis."""

from collections.abc import Callable


class SharedClock:
    """Unix seconds by Redis' clock: the local time, corrected by what Redis last said. Local time before that."""

    def __init__(self, local: Callable[[], float]) -> None:
        self.local = local
        self._offset_s = 0.0

    def __call__(self) -> float:
        return self.local() + self._offset_s

    def adjust(self, shared: float, *, asked_at: float) -> None:
        """`shared` is what Redis said since `asked_at`, a local time.

        That bounds the offset. It moves only if it is out of the bounds, so a slow answer does not disturb the clock.
        """
        self._offset_s = min(max(self._offset_s, shared - self.local()), shared - asked_at)
