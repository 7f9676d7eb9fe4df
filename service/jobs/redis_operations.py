"""The client of Redis, and operations: each takes a bounded time, and fails as StoreUnavailable."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.errors import StoreUnavailable

PREFIX = "elastic:"
"""All keys of the service begin with it."""
LIMIT_S = 5.0
"""How long an operation may take. It has few commands, with little data; a busy machine may be slow."""
RESULTS_LIMIT_S = 30.0
"""How long it may take to write or to read results or an input image, which may have megabytes. Also on a volume."""
CHECK_LIMIT_S = 1.5
"""How long a check may take. Probes of readiness give up soon."""
_SILENCE_S = 1.0
MOST_AT_ONCE = 100
"""Operations beyond these wait, since each takes a connection, and a client of Redis has only so many."""


def connect(url: str) -> Redis:
    """A client with short timeouts that retries briefly when its connection is lost."""
    return Redis.from_url(
        url,
        socket_timeout=3,
        socket_connect_timeout=2,
        health_check_interval=15,
        max_connections=2 * MOST_AT_ONCE + 10,  # for jobs and for results, and one that listens
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.02), 2),
        retry_on_error=[RedisConnectionError, RedisTimeoutError],
    )


class RedisOperations:
    """`on_error` is called with the name of every operation that fails.

    At most MOST_AT_ONCE run at a time. A Redis that let an operation wait in vain is not asked again for a second: the
    calls meanwhile fail at once.
    """

    def __init__(self, on_error: Callable[[str], None]) -> None:
        self._on_error = on_error
        self._silent_until = 0.0
        self._connections = asyncio.Semaphore(MOST_AT_ONCE)

    @asynccontextmanager
    async def __call__(self, name: str, limit_s: float = LIMIT_S) -> AsyncIterator[None]:
        """Raises StoreUnavailable for errors of Redis and of the network, and after `limit_s` seconds."""
        try:
            if time.monotonic() < self._silent_until:
                raise ConnectionError("Redis did not answer a moment ago")
            async with asyncio.timeout(limit_s), self._connections:
                yield
        except ResponseError as error:  # it answers, but refuses: it is full, or a replica
            self._on_error(name)
            raise StoreUnavailable(f"the job store refuses to work: {_reason(error)}") from error
        except (RedisError, OSError) as error:
            if isinstance(error, RedisTimeoutError | TimeoutError):
                self._silent_until = time.monotonic() + _SILENCE_S
            self._on_error(name)
            raise StoreUnavailable("the job store can't be reached; try again in a moment") from error


def _reason(error: ResponseError) -> str:
    """What Redis says, without the name and the line of our script."""
    return str(error).partition(" script: ")[0].rstrip(".")
