import asyncio

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from service.errors import StoreUnavailable
from service.jobs import redis_operations
from service.jobs.redis_operations import RedisOperations

pytestmark = pytest.mark.anyio


async def test_operation_that_hangs_is_given_up_and_others_fail_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[str] = []
    operation = RedisOperations(errors.append)
    monkeypatch.setattr(redis_operations, "_SILENCE_S", 60.0)
    with pytest.raises(StoreUnavailable, match="can't be reached"):
        async with operation("get", 0.01):
            await asyncio.Event().wait()
    with pytest.raises(StoreUnavailable, match="can't be reached"):
        async with operation("add"):
            pytest.fail("Redis was asked again")
    assert errors == ["get", "add"]


async def test_redis_is_asked_again_after_it_did_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = RedisOperations(lambda name: None)
    monkeypatch.setattr(redis_operations, "_SILENCE_S", 0.0)
    with pytest.raises(StoreUnavailable):
        async with operation("get", 0.01):
            await asyncio.Event().wait()
    async with operation("get"):
        pass


async def test_lost_connection_does_not_hold_up_the_next_operation() -> None:
    operation = RedisOperations(lambda name: None)
    with pytest.raises(StoreUnavailable, match="can't be reached"):
        async with operation("get"):
            raise RedisConnectionError("Connection reset by peer at 10.0.0.1:6379")
    async with operation("get"):
        pass
