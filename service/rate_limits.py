"""Rate limits, counted in memory, or in Redis so that all servers share the count."""

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from typing import Any

from limits import RateLimitItem, parse_many
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import MovingWindowRateLimiter
from limits.errors import StorageError
from redis.asyncio import BlockingConnectionPool

from service.errors import StoreUnavailable

logger = logging.getLogger(__name__)

# A call waits at most this long for Redis before it is answered 503.
_REDIS_TIMEOUT_S = 2.0
_MAX_CONNECTIONS = 16
_KEY_PREFIX = "elastic:rate_limits"


@dataclass(frozen=True, slots=True)
class RateLimitStatus:
    """A caller's rate limit after a call: `remaining` of `limit` calls are left, one more after `reset_s` seconds."""

    is_allowed: bool
    limit: int
    remaining: int
    reset_s: int


def parse_rate_limit(text: str) -> RateLimitItem:
    """One limit in the notation of the library `limits`, such as "60/minute". Raises ValueError."""
    try:
        parsed = parse_many(text)
    except ValueError:
        parsed = []
    if len(parsed) != 1 or parsed[0].amount < 1:
        raise ValueError(f"'{text}' is not a rate limit; write one such as 60/minute or 10 per 5 seconds")
    return parsed[0]


class RateLimits:
    """Counts calls in a moving window. A fixed window would allow twice the limit around its border."""

    def __init__(self, redis_url: str | None) -> None:
        self._connections = None if redis_url is None else _connections(redis_url)
        storage = MemoryStorage() if self._connections is None else _redis_storage(self._connections)
        self._limiter = MovingWindowRateLimiter(storage)

    async def count(self, limit: RateLimitItem, *caller: str) -> RateLimitStatus:
        """Count a call of `caller`, unless it exceeds the limit. Raises StoreUnavailable."""
        try:
            async with asyncio.timeout(_REDIS_TIMEOUT_S):
                is_allowed = await self._limiter.hit(limit, *caller)
                reset_at, remaining = await self._limiter.get_window_stats(limit, *caller)
        except (StorageError, TimeoutError) as error:
            logger.warning("calls can't be counted and are answered 503: %r", error)
            raise StoreUnavailable("the store that counts calls can't be reached") from error
        return RateLimitStatus(is_allowed, limit.amount, max(0, remaining), max(1, math.ceil(reset_at - time.time())))

    async def close(self) -> None:
        if self._connections is not None:
            await self._connections.disconnect()


def _connections(redis_url: str) -> BlockingConnectionPool:
    """A pool in which a burst of calls waits for a connection instead of failing; each needs one for milliseconds."""
    return BlockingConnectionPool.from_url(
        redis_url,
        max_connections=_MAX_CONNECTIONS,
        timeout=_REDIS_TIMEOUT_S,
        socket_timeout=_REDIS_TIMEOUT_S,
        socket_connect_timeout=_REDIS_TIMEOUT_S,
    )


def _redis_storage(connections: BlockingConnectionPool) -> RedisStorage:
    options: dict[str, Any] = {"connection_pool": connections}  # limits types its options as numbers and texts
    return RedisStorage(
        "async+redis://", wrap_exceptions=True, implementation="redispy", key_prefix=_KEY_PREFIX, **options
    )
