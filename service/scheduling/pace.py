"""Measured times: of work against its prediction, and of what recurs. The clock is passed in."""

from threading import Lock

# Work counts half after this much more of it, so that the ratio follows the load, but not every job.
_HALF_LIFE_S = 30.0


class Pace:
    """How long a worker's jobs take, over their predicted seconds. All methods may be called from any thread.

    The time is that in which the worker has any job, so it holds all costs of a job, whatever was predicted for it, and
    what batches and parallel decoding save. It tells as well if the machine was busy when a step was measured.
    """

    def __init__(self) -> None:
        self._busy_s = 0.0
        self._predicted_s = 0.0
        self._busy_since = 0.0
        self._lock = Lock()

    def begin(self, now: float) -> None:
        """The worker has a job after it had none. `now` is in seconds, as in `advance`."""
        with self._lock:
            self._busy_since = now

    def advance(self, predicted_s: float, now: float) -> None:
        """Work of `predicted_s` was done since the last `begin` or `advance`."""
        with self._lock:
            busy_s = now - self._busy_since
            kept = 0.5 ** (busy_s / _HALF_LIFE_S)
            self._busy_s = kept * self._busy_s + busy_s
            self._predicted_s = kept * self._predicted_s + predicted_s
            self._busy_since = now

    @property
    def ratio(self) -> float:
        """Measured seconds for each predicted second; 1 before any work was done."""
        with self._lock:
            return self._busy_s / self._predicted_s if self._predicted_s > 0 else 1.0


class Peak:
    """What something takes lately, in seconds, at most.

    It follows a longer time at once, and a shorter one by the share `fall` of the difference. Any thread may read it.
    """

    def __init__(self, fall: float) -> None:
        self.seconds = 0.0
        self._fall = fall

    def observe(self, seconds: float) -> None:
        self.seconds = max(seconds, self.seconds + self._fall * (seconds - self.seconds))
