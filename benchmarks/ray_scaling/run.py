"""One run: the load rises and falls while processes are killed; then every job is checked."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2

from benchmarks.ray_scaling.cluster import RayCluster, Replica
from deploy.ray.policy import wanted
from service.app import build_store
from service.errors import StoreUnavailable
from service.jobs.job import JobStatus
from service.jobs.store import BEGINNING, EventName, JobStore, follow
from service.metrics import Metrics
from service.scheduling.fleet import Load
from service.settings import load_settings

_LOOK_S = 0.25
_WAIT_S = 600.0
"""How long the run waits for one thing to happen."""
_CALL_S = 30.0
_AFTER_END_S = 3.0
"""After its end, a job is looked at again: a worker whose lease had run out may have ended it a second time."""


@dataclass
class Findings:
    """What a run showed.

    `ends` counts the accepted jobs by how they ended, `attempts` by how many workers began them, `refused` the other
    answers by their code. `seconds_back` says how long it took after a kill until all replicas ran again, and `ready`
    what /readyz said of the models then. `faults` says what was wrong.
    """

    accepted: list[str] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list)
    seconds_back: dict[str, float] = field(default_factory=dict)
    ready: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return {
            "accepted": len(self.accepted),
            "refused": dict(self.refused),
            "ends": dict(self.ends),
            "attempts": dict(self.attempts),
            "seconds_back": self.seconds_back,
            "ready": self.ready,
            "seconds": round(self.seconds, 1),
            "log": self.log,
            "faults": self.faults,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The scale goes from `least` replicas to `most` and back.

    `depth` jobs are unfinished at any time while the scale is to rise; `body` is the request. `kills` says what is
    killed under this load: api, worker, node, controller. Those in one tuple are killed together.
    """

    model: str
    body: dict[str, Any]
    least: int
    most: int
    depth: int
    target_s: float
    kills: tuple[tuple[str, ...], ...]


class Run:
    def __init__(self, plan: Plan, cluster: RayCluster, client: httpx2.AsyncClient, store: JobStore) -> None:
        self.findings = Findings()
        self._plan = plan
        self._cluster = cluster
        self._client = client
        self._store = store
        self._began = time.monotonic()
        self._depth = 0
        self._looked = asyncio.Event()
        self._load = Load()
        self._replicas: list[Replica] | None = []  # None while they are not known
        self._followers: list[asyncio.Task[None]] = []

    async def run(self) -> Findings:
        tasks = [asyncio.create_task(work()) for work in (self._watch_queue, self._watch_replicas, self._ask)]
        try:
            await self._scale()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._followers)
        if len(set(self.findings.accepted)) < len(self.findings.accepted):
            self.findings.faults.append("two calls with different keys got the same job")
        self.findings.seconds = time.monotonic() - self._began
        return self.findings

    async def _scale(self) -> None:
        plan = self._plan
        await self._until(lambda: self._num_replicas() == plan.least, f"{plan.least} replicas run")
        if plan.least:
            self._depth = 1
            await self._until(lambda: self._load.of(plan.model).num_running > 0, "a job runs")
        self._depth = plan.depth
        self._say(f"load: {plan.depth} unfinished jobs")
        await self._until(lambda: self._num_replicas() == plan.most, f"{plan.most} replicas run")
        for names in plan.kills:
            await self._kill(names)
        self._depth = min(plan.least, 1)
        self._say(f"load: {self._depth} unfinished jobs")
        await self._until(lambda: self._num_replicas() == plan.least, f"{plan.least} replicas run")
        self._depth = 0
        await self._until(lambda: self._num_unfinished() == 0, "all jobs have ended")

    async def _kill(self, names: tuple[str, ...]) -> None:
        """Kill something while all workers are busy, and wait until all is back."""
        model, most = self._plan.model, self._plan.most
        await self._until(lambda: self._load.of(model).num_running >= most, "all workers are busy")
        began = time.monotonic()
        lost = await asyncio.to_thread(self._cluster.kill, names, self._replicas or ())
        self._say(f"KILLED {' and '.join(names)}: {len(lost)} workers are lost")
        self._replicas = None

        def are_back() -> bool:
            pids = {replica.pid for replica in self._replicas or ()}
            return len(pids) == most and not pids & lost

        await self._until(are_back, "all replicas are back")
        await self._until_true(self._answers, "the API answers")
        seconds = self.findings.seconds_back[" and ".join(names)] = round(time.monotonic() - began, 1)
        self._say(f"all is back after {seconds} s")

    async def _answers(self) -> bool:
        try:
            answer = await self._client.get("/readyz")
        except httpx2.TransportError:
            return False
        if answer.status_code == 200:
            self.findings.ready = answer.json()["models"]
        return answer.status_code == 200

    async def _ask(self) -> None:
        """Keep `_depth` jobs unfinished."""
        number = 0
        while True:
            self._looked.clear()
            await self._looked.wait()
            for _ in range(self._depth - self._num_unfinished()):
                number += 1
                await self._submit(number)

    async def _submit(self, number: int) -> None:
        """Ask until the job is accepted. A call that broke off is made again with its key, which makes one job."""
        headers = {"Prefer": "respond-async", "Idempotency-Key": f"job-{number}"}
        while True:
            try:
                answer = await self._client.post(
                    "/v1/images", json={**self._plan.body, "seed": number}, headers=headers
                )
            except httpx2.TransportError as error:
                self.findings.refused[type(error).__name__] += 1
                await asyncio.sleep(_LOOK_S)
                continue
            if answer.status_code == 202:
                self._follow(answer.json()["id"])
                return
            self.findings.refused[_code_of(answer)] += 1
            await asyncio.sleep(min(float(answer.headers.get("Retry-After", 1)), 2.0))

    async def _watch_queue(self) -> None:
        while True:
            with suppress(StoreUnavailable):
                self._load = await self._store.load()
                self._looked.set()
            await asyncio.sleep(_LOOK_S)

    async def _watch_replicas(self) -> None:
        """Look at the replicas, and log their number when it has changed."""
        seen: int | None = None
        while True:
            self._replicas = await asyncio.to_thread(self._cluster.replicas, f"worker-{self._plan.model}")
            if self._replicas is not None and len(self._replicas) != seen:
                seen, load = len(self._replicas), self._load.of(self._plan.model)
                num_wanted = await wanted(self._store, self._plan.model, self._plan.target_s)
                self._say(f"replicas {seen}; wanted {num_wanted}, {load.num_queued} queued, {load.num_running} running")
            await asyncio.sleep(_LOOK_S)

    def _num_replicas(self) -> int:
        return len(self._replicas or ())

    def _num_unfinished(self) -> int:
        load = self._load.of(self._plan.model)
        return load.num_queued + load.num_running

    async def _until(self, holds: Callable[[], bool], what: str) -> None:
        async def check() -> bool:
            return holds()

        await self._until_true(check, what)

    async def _until_true(self, holds: Callable[[], Awaitable[bool]], what: str) -> None:
        ends = time.monotonic() + _WAIT_S
        while not await holds():
            if time.monotonic() > ends:
                raise TimeoutError(f"after {_WAIT_S:.0f} s it is not so that {what}")
            await asyncio.sleep(_LOOK_S)

    def _follow(self, job_id: str) -> None:
        self.findings.accepted.append(job_id)
        self._followers.append(asyncio.create_task(self._judge(job_id)))

    async def _judge(self, job_id: str) -> None:
        """An accepted job must succeed, and end once."""
        async for _ in follow(self._store, job_id):
            pass
        await asyncio.sleep(_AFTER_END_S)
        events = await self._store.events(job_id, BEGINNING)
        ends = [event.data["status"] for event in events if event.name is EventName.ENDED]
        self.findings.ends[" ".join(ends)] += 1
        self.findings.attempts[sum(event.name is EventName.STARTED for event in events)] += 1
        if ends != [JobStatus.SUCCEEDED]:
            self.findings.faults.append(f"{job_id} ended as {ends}")

    def _say(self, text: str) -> None:
        line = f"{time.monotonic() - self._began:6.1f} s  {text}"
        self.findings.log.append(line)
        print(line, flush=True)


def _code_of(answer: httpx2.Response) -> str:
    try:
        return f"{answer.status_code} {answer.json()['error']['code']}"
    except (ValueError, KeyError, TypeError):  # an answer of Serve's own proxy
        return str(answer.status_code)


async def scale(plan: Plan, cluster: RayCluster) -> Findings:
    store = build_store(load_settings(redis_url=cluster.redis_url), Metrics())
    async with httpx2.AsyncClient(base_url=cluster.url, timeout=_CALL_S) as client:
        try:
            return await Run(plan, cluster, client, store).run()
        finally:
            await store.close()
