"""How a worker claims jobs from the queues in Redis, with few attempts that find nothing."""

import asyncio
import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.jobs.redis_records import KindEntry, load_kind, model_of
from service.jobs.store import Fit, Fits, JobKind

_POLL_S = 4.0
"""Messages can be lost, so an idle worker looks at the queues at this interval."""
_POLL_WAITING_S = 1.0
"""How often a worker looks while jobs wait that do not fit. It is not woken for others of their class then."""
_MOST_KINDS = 1000


@dataclass(frozen=True, slots=True)
class Claimed:
    """A claimed job: its fields in Redis, and the kind by which the worker chose it; None if that can't be read."""

    job_id: str
    lease: str
    kind: JobKind | None
    fields: Mapping[bytes, bytes]


class Claims:
    """The claims of one worker. `run` runs the script CLAIM. After `wake`, the next call looks at the queues.

    A worker that finds nothing is put down as idle by the same script. A new job wakes one idle worker of its class, so
    there is no need to look before that. If jobs wait that do not fit, they are remembered. There is no need to look
    before one of them fits.
    """

    def __init__(self, run: Callable[..., Awaitable[Any]], worker_id: str, *, lease_ms: int) -> None:
        self.models: Sequence[str] = ()
        """The models of this worker, once it has announced them."""
        self._worker_id = worker_id
        self._run = run
        self._lease_ms = lease_ms
        self._known: dict[str, KindEntry | None] = {}  # entries that can't be read are None
        self._waiting: list[str] = []
        self._looks_at = 0.0
        self._is_woken = False
        self._lock = asyncio.Lock()  # a repeated script finds only the latest claim again

    def wake(self) -> None:
        self._is_woken = True

    async def claim(self, fits: Fits, started_at: float) -> Claimed | None:
        async with self._lock:
            asked: dict[JobKind, Fit] = {}

            def fit_of(name: str) -> Fit:
                entry = self._known[name]
                if entry is None:
                    return Fit.NOW  # to fail the job
                if entry.is_newer:
                    return Fit.NO
                if entry.kind not in asked:
                    asked[entry.kind] = fits(entry.kind)
                return asked[entry.kind]

            if not self._is_worth_a_look(fit_of):
                return None
            if len(self._known) > _MOST_KINDS:
                self._known.clear()
            self._waiting, self._looks_at = [], 0.0
            lease = uuid.uuid4().hex
            while True:
                self._is_woken = False  # here, since it may be woken again before the answer arrives
                verdicts = {name: fit_of(name).value for name in self._known if self._may_have(name)}
                question = json.dumps({"models": self.models, "fits": verdicts})
                job_id, kind, fields, waiting, unknown = await self._run(
                    self._worker_id, lease, self._lease_ms, started_at, question
                )
                if job_id:
                    entry = self._known.get(kind.decode())
                    pairs = dict(zip(fields[::2], fields[1::2], strict=True))
                    return Claimed(job_id.decode(), lease, None if entry is None else entry.kind, pairs)
                if not unknown:
                    self._sleep([name.decode() for name in waiting])
                    return None
                self._learn(unknown)

    def _is_worth_a_look(self, fit_of: Callable[[str], Fit]) -> bool:
        if self._is_woken or time.monotonic() >= self._looks_at:
            return True
        fits = (fit_of(name) for name in self._waiting)
        return next((fit for fit in fits if fit is not Fit.NO), Fit.NO) is Fit.NOW

    def _sleep(self, waiting: list[str]) -> None:
        if self.models:  # else it is not woken
            self._waiting = waiting
            # Not all workers at once
            self._looks_at = time.monotonic() + random.uniform(0.5, 1.0) * (_POLL_WAITING_S if waiting else _POLL_S)

    def _may_have(self, name: str) -> bool:
        return not self.models or model_of(name) in self.models

    def _learn(self, unknown: Sequence[bytes]) -> None:
        for name, data in zip(unknown[::2], unknown[1::2], strict=True):
            self._known[name.decode()] = load_kind(data)
