"""The messages of Redis' channels. One connection serves all waiting tasks of a process. Messages can be lost."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from redis.exceptions import RedisError

logger = logging.getLogger(__name__)

_RECONNECT_S = 0.5


class Messages:
    """Listens to channels while it is open, and calls `on_message` with the channel and each message.

    It calls `on_message` with an empty message as soon as a channel is heard: what was said before is lost.
    """

    def __init__(self, redis: Any, on_message: Callable[[str, str], None]) -> None:
        self._redis = redis
        self._on_message = on_message
        self._channels: set[str] = set()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def listen(self, channel: str) -> None:
        self._channels.add(channel)
        self._changed.set()

    def ignore(self, channel: str) -> None:
        self._channels.discard(channel)
        self._changed.set()

    def open(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            try:
                async with self._redis.pubsub() as connection:
                    await _first_of(self._subscribe(connection), self._receive(connection))
            except (RedisError, OSError) as error:
                logger.warning("lost the connection that announces changes: %s", error)
                await asyncio.sleep(_RECONNECT_S)

    async def _subscribe(self, connection: Any) -> None:
        heard: set[str] = set()
        while True:
            self._changed.clear()
            wanted = set(self._channels)
            if new := wanted - heard:
                await connection.subscribe(*new)
            if old := heard - wanted:
                await connection.unsubscribe(*old)
            heard = wanted
            await self._changed.wait()

    async def _receive(self, connection: Any) -> None:
        while True:
            if not connection.subscribed:
                await asyncio.sleep(0.01)
                continue
            message = await connection.get_message(timeout=1)
            if message is None:
                continue
            text = message["data"] if message["type"] == "message" else b""
            if message["type"] in ("message", "subscribe"):
                self._on_message(message["channel"].decode(), text.decode(errors="replace"))


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Run all until one ends; raise its error."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
