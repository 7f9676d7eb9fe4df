"""How often somebody may call. Counted in memory, or in Redis so that all servers share the count."""

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

# Counting is quick or it does not happen: a call waits at most so long for Redis before it is answered 503.
_REDIS_TIMEOUT_S = 2.0
_MAX_CONNECTIONS = 16
_KEY_PREFIX = "elastic:rate_limits"


@dataclass(frozen=True, slots=True)
class RateLimitStatus:
    """Where a caller stands after a call: `remaining` of `limit` are left, one more `reset_s` seconds from now."""

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
        raise ValueError(f"'{text}' is no rate limit; write one such as 60/minute or 10 per 5 seconds")
    return parsed[0]


class RateLimits:
    """A moving window: never more than the limit in any stretch of its length, which a fixed one lets be twice that."""

    def __init__(self, redis_url: str | None) -> None:
        self._connections = None if redis_url is None else _connections(redis_url)
        storage = MemoryStorage() if self._connections is None else _redis_storage(self._connections)
        self._limiter = MovingWindowRateLimiter(storage)

    async def count(self, limit: RateLimitItem, *caller: str) -> RateLimitStatus:
        """Count a call of `caller`, unless it is one too many. Raises StoreUnavailable."""
        try:
            is_allowed = await self._limiter.hit(limit, *caller)
            reset_at, remaining = await self._limiter.get_window_stats(limit, *caller)
        except StorageError as error:
            logger.warning("calls can't be counted, they are answered 503: %s", error)
            raise StoreUnavailable("the store that counts calls can't be reached") from error
        return RateLimitStatus(is_allowed, limit.amount, max(0, remaining), max(1, math.ceil(reset_at - time.time())))

    async def close(self) -> None:
        if self._connections is not None:
            await self._connections.disconnect()


def _connections(redis_url: str) -> BlockingConnectionPool:
    """A burst of calls waits for a connection, which each needs for milliseconds, instead of failing for want of it."""
    return BlockingConnectionPool.from_url(
        redis_url,
        max_connections=_MAX_CONNECTIONS,
        timeout=_REDIS_TIMEOUT_S,
        socket_timeout=_REDIS_TIMEOUT_S,
        socket_connect_timeout=_REDIS_TIMEOUT_S,
    )


def _redis_storage(connections: BlockingConnectionPool) -> RedisStorage:
    options: dict[str, Any] = {"connection_pool": connections}  # limits says that options are numbers and texts
    return RedisStorage(
        "async+redis://", wrap_exceptions=True, implementation="redispy", key_prefix=_KEY_PREFIX, **options
    )
