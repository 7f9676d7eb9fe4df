"""Runs one test with the sync client and with the async one, whose calls are wrapped so that they block."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from typing import Any

import httpx2
import pytest

from elastic_dit_client import AsyncClient, Client, StreamEvent


class FakeClock:
    """A clock that `sleep` moves at once. `slept` lists the pauses."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def read(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


class Blocking:
    """An AsyncClient whose calls block until they have ended."""

    def __init__(self, client: AsyncClient, runner: asyncio.Runner) -> None:
        self.client, self.runner = client, runner

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **fields: Any) -> Any:
            asked = getattr(self.client, name)(*arguments, **fields)
            return self._each(asked) if isinstance(asked, AsyncGenerator) else self.runner.run(asked)

        return call

    def _each(self, events: AsyncGenerator[StreamEvent, None]) -> Generator[StreamEvent, None, None]:
        async def following() -> StreamEvent | None:
            return await anext(events, None)

        async def close() -> None:
            await events.aclose()

        try:
            while (event := self.runner.run(following())) is not None:
                yield event
        finally:
            self.runner.run(close())


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(params=["sync", "async"])
def start(request: pytest.FixtureRequest, clock: FakeClock, runner: asyncio.Runner) -> Iterator[Callable[..., Any]]:
    """Makes a client with the fake clock. It uses `transport`, or real connections without one."""
    clients: list[Any] = []

    def start(url: str, transport: httpx2.MockTransport | None = None, **options: Any) -> Any:
        if request.param == "sync":
            http = httpx2.Client(transport=transport)
            clients.append((http.close, None))
            return Client(url, http=http, clock=clock.read, sleep=clock.sleep, **options)
        http_async = httpx2.AsyncClient(transport=transport)
        client = AsyncClient(url, http=http_async, clock=clock.read, sleep=clock.sleep_async, **options)
        clients.append((client.aclose, http_async.aclose))
        return Blocking(client, runner)

    yield start
    for close, close_http in clients:
        if close_http is None:
            close()
        else:
            runner.run(close())
            runner.run(close_http())
