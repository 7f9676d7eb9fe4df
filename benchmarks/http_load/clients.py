"""The clients of the benchmark: they call a server over HTTP and note what it answers.

They run in a process of their own, on a core that the server does not use.
"""

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx2

_ANSWER_S = 900.0
_REFUSED = (429, 503)
NO_ANSWER = 0
"""The status of a call whose connection broke."""
_KEPT = ("quality_applied", "degraded", "deadline_met")
"""The fields of a receipt that are kept."""


@dataclass(frozen=True, slots=True)
class Call:
    """Request `number` of a run, which arrives `at` seconds after its begin. `keeps_file` says to return the file."""

    number: int
    body: dict[str, Any]
    at: float = 0.0
    keeps_file: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """`seconds` is the time of the first answer after the call, and `ended` its time after the begin of the run.

    A refused call with `retry_after_s` was made once more after this time, which got `second_status`. Our server also
    gives a `receipt`.
    """

    number: int
    status: int
    seconds: float
    ended: float
    retry_after_s: float | None = None
    second_status: int | None = None
    receipt: dict[str, Any] | None = None
    file: bytes | None = None


def use_core(core: int) -> None:
    """Let this process, and those that it starts from now on, run on one core."""
    os.sched_setaffinity(0, {core})


def call_at_times(url: str, calls: Sequence[Call]) -> list[Answer]:
    """Make each call at its time, whether those before it are answered or not (open loop).

    A client that is told to come back later obeys `Retry-After` once.
    """
    return asyncio.run(_open_loop(url, calls))


def call_in_turn(url: str, calls: Sequence[Call], num_clients: int) -> list[Answer]:
    """Each of the clients makes the next call when its last one is answered, until all are made (closed loop).

    Raises RuntimeError if one is refused or fails.
    """
    return asyncio.run(_closed_loop(url, calls, num_clients))


async def _open_loop(url: str, calls: Sequence[Call]) -> list[Answer]:
    began = time.perf_counter()

    async def at_its_time(call: Call) -> Answer:
        await asyncio.sleep(began + call.at - time.perf_counter())
        return await _made(client, call, began, retries=True)

    async with _client(url) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(at_its_time(call)) for call in calls]
    return [task.result() for task in tasks]


async def _closed_loop(url: str, calls: Sequence[Call], num_clients: int) -> list[Answer]:
    began, left, answers = time.perf_counter(), iter(calls), list[Answer]()

    async def go_on() -> None:
        for call in left:
            answer = await _made(client, call, began, retries=False)
            if answer.status != 200:
                raise RuntimeError(f"{url} answered {answer.status} to {call.body}")
            answers.append(answer)

    async with _client(url) as client:
        await asyncio.gather(*(go_on() for _ in range(num_clients)))
    return answers


def _client(url: str) -> httpx2.AsyncClient:
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx2.AsyncClient(base_url=url, timeout=_ANSWER_S, limits=limits)


async def _made(client: httpx2.AsyncClient, call: Call, began: float, *, retries: bool) -> Answer:
    sent = time.perf_counter()
    try:
        response = await client.post("/v1/images", json=call.body)
    except httpx2.TransportError:
        ended = time.perf_counter()
        return Answer(call.number, NO_ANSWER, ended - sent, ended - began)
    ended = time.perf_counter()
    retry_after_s = second_status = None
    receipt = json.loads(response.headers.get("X-Receipt", "null"))
    if response.status_code in _REFUSED and "Retry-After" in response.headers:
        retry_after_s = float(response.headers["Retry-After"])
        if retries:
            await asyncio.sleep(retry_after_s)
            second_status = (await client.post("/v1/images", json=call.body)).status_code
    return Answer(
        call.number,
        response.status_code,
        ended - sent,
        ended - began,
        retry_after_s,
        second_status,
        receipt and {name: receipt[name] for name in _KEPT},
        response.content if call.keeps_file and response.is_success else None,
    )
