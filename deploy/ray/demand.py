"""Calls for models that no worker holds: they start a worker where the least number of replicas is 0."""

from collections.abc import Iterable

from redis.asyncio import Redis

from service.jobs.redis_operations import PREFIX, connect

ASKED_S = 60
"""How long a call counts, unless a worker has the model earlier. Clients repeat it, as Retry-After says."""


class Demand:
    """A mark in Redis for each model that was asked for. Redis' errors are not caught."""

    def __init__(self, redis_url: str) -> None:
        self._redis: Redis = connect(redis_url)

    async def ask(self, models: Iterable[str]) -> None:
        for model in models:
            await self._redis.set(_key(model), 1, ex=ASKED_S)

    async def is_asked(self, model: str) -> bool:
        return bool(await self._redis.exists(_key(model)))

    async def close(self) -> None:
        await self._redis.aclose()


def _key(model: str) -> str:
    return f"{PREFIX}asked:{model}"
