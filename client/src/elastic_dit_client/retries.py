"""When a client tries again: attempts within one call, and connections to one job's events."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import httpx2

from elastic_dit_client.protocol import SILENCE_S, ApiError, Call, StreamEvent, job_path

_CONNECT_S = 10.0
# A wait with a time limit checks its clock at least this often while the server is silent.
_CLOCK_CHECK_S = 2.0
_POLL_S = 1.0
# The time limit of each of the two requests with which an interrupted call cancels its job.
_ABANDON_S = 5.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.5, 8.0


def _backoff_s(num_failures: int) -> float:
    return min(_FIRST_BACKOFF_S * 2.0 ** (num_failures - 1), _MAX_BACKOFF_S)


@dataclass(slots=True)
class Attempts:
    """The attempts of one call. It must end before `deadline`, read on `clock`.

    `is_unanswered` says that a request was sent and not answered, so it may have made a job.
    """

    max_retries: int
    deadline: float
    clock: Callable[[], float]
    num_failures: int = 0
    is_unanswered: bool = False

    def timeout(self, call: Call) -> httpx2.Timeout:
        left_s = max(self.deadline - self.clock(), 0.001)
        silence_s = left_s if call.silence_s is None else min(left_s, call.silence_s)
        return httpx2.Timeout(silence_s, connect=min(left_s, _CONNECT_S))

    def wait_s(self, failure: ApiError | httpx2.TransportError) -> float:
        """Seconds to wait before the next attempt. Raises `failure` if there is none."""
        self.num_failures += 1
        if isinstance(failure, ApiError):
            wait_s = failure.retry_after_s if failure.status in (429, 503) else None
        else:
            wait_s = _backoff_s(self.num_failures)
        if wait_s is None or self.num_failures > self.max_retries or self.clock() + wait_s >= self.deadline:
            raise failure
        return wait_s


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """The server's address and key, and the limits of a call: `timeout_s` holds for one call with all its retries."""

    base_url: str
    api_key: str | None
    timeout_s: float
    max_retries: int
    clock: Callable[[], float]

    def begin(self, deadline: float | None = None) -> Attempts:
        latest = self.clock() + self.timeout_s
        return Attempts(self.max_retries, latest if deadline is None else min(latest, deadline), self.clock)

    def begin_to_abandon(self) -> Attempts:
        return Attempts(0, self.clock() + _ABANDON_S, self.clock)

    def url(self, call: Call) -> str:
        return f"{self.base_url.rstrip('/')}{call.path}"

    def headers(self, call: Call) -> dict[str, str]:
        key = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        return {**call.headers, **key}


@dataclass(slots=True)
class Watch:
    """The state of reading one job's events, over any number of connections.

    Reading raises TimeoutError after `deadline`, if there is one. The job's last event sets `is_over`.
    """

    settings: ConnectionSettings
    job_id: str | None = None
    last_id: str | None = None
    deadline: float | None = None
    is_over: bool = False
    _num_failures: int = 0
    _has_news: bool = False
    _failure: ApiError | httpx2.TransportError | None = None

    def begin(self) -> Attempts:
        """Open the next connection. Raises TimeoutError after the deadline."""
        self.check_time()
        self._has_news, self._failure = False, None
        return self.settings.begin(self.deadline)

    def call(self) -> Call:
        assert self.job_id is not None
        headers = {} if self.last_id is None else {"Last-Event-ID": self.last_id}
        silence_s = SILENCE_S if self.deadline is None else _CLOCK_CHECK_S
        return Call("GET", f"{job_path(self.job_id)}/events", headers=headers, is_stream=True, silence_s=silence_s)

    def check_time(self) -> None:
        if self.deadline is not None and self.settings.clock() >= self.deadline:
            raise TimeoutError(f"job {self.job_id} has not ended in time")

    def take(self, sent: httpx2.ServerSentEvent) -> StreamEvent | None:
        """The event, or None if the server reports an error of its own. Raises ApiError if the job failed."""
        self.check_time()
        data = json.loads(sent.data)
        # Only a job's events have ids. For an event without one the parser repeats the last id.
        is_of_job = sent.id not in ("", self.last_id)
        if sent.event == "error":
            detail = data["error"]
            error = ApiError(None, detail["code"], detail["message"], detail["param"])
            if is_of_job:
                self.is_over = True
                raise error
            self._failure = error
            return None
        event = StreamEvent(sent.event, sent.id or None, data)
        self.last_id, self.is_over = sent.id or self.last_id, event.is_last
        self._num_failures, self._has_news = 0, True
        return event

    def note_broken(self, error: httpx2.TransportError) -> None:
        """Note that the connection broke."""
        self._failure = error

    @property
    def may_be_at_its_end(self) -> bool:
        """Whether the connection ended without any event. That is usual only after a job's last event."""
        return not self._has_news and self._failure is None

    def wait_s(self) -> float:
        """Seconds to wait before the next connection. Raises the last connection's error if there is none."""
        if self.deadline is not None and isinstance(self._failure, httpx2.ReadTimeout):
            return 0.0  # the read timeout was only there to check the clock
        self._num_failures += 1
        if self._num_failures > self.settings.max_retries:
            raise self._failure or httpx2.RemoteProtocolError(f"the events of job {self.job_id} end before the job")
        return _backoff_s(self._num_failures)

    def poll_s(self) -> float:
        self.check_time()
        return _POLL_S
