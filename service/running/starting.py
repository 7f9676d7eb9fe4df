"""Starts of requests: their preparation, and the encoding of their prompt or image."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from service.jobs.job import Job
from service.jobs.store import Claim
from service.metrics import Metrics
from service.running.held import HeldJob, Running
from service.running.preparer import Preparer
from service.running.publisher import Publisher
from service.scheduling.batching import FairShare
from service.scheduling.cost import block_seconds
from service.scheduling.precedence import Precedence

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine


class Starter:
    """Used by the worker's thread. `ready` are the running requests that can have a turn; `add` takes a new one.

    `claim_place` says whether there is room for request `index` of a job, which then counts as started.
    """

    def __init__(
        self,
        metrics: Metrics,
        publisher: Publisher,
        fair_share: FairShare,
        precedence: Precedence,
        *,
        ready: Callable[[], Sequence[Running]],
        claim_place: Callable[[HeldJob, int], bool],
        add: Callable[[Running], None],
        is_held: Callable[[Claim], bool],
        on_prepared: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._publisher = publisher
        self._fair_share = fair_share
        self._precedence = precedence
        self._ready = ready
        self._claim_place = claim_place
        self._add = add
        self._is_held = is_held
        self._clock = clock
        self._preparer = Preparer(on_prepared)

    def start_what_fits(self, engine: "Engine", jobs: Iterable[HeldJob]) -> None:
        for held, index in [(job, index) for job in jobs for index in job.unstarted]:
            if not self._is_prepared(engine, held, index) or self._keeps_out(engine, held.job):
                continue
            if self._claim_place(held, index):
                self._start(engine, held, index)

    def close(self) -> None:
        self._preparer.close()

    def _keeps_out(self, engine: "Engine", job: Job) -> bool:
        """Whether starting it, which encodes its prompt or image, would be in the way of those of high priority."""
        classes, needed_s = {ready.job.is_high for ready in self._ready()}, engine.cards[job.model].encode_seconds
        return not job.is_high and len(classes) == 2 and not self._precedence.are_owed(needed_s)

    def _is_prepared(self, engine: "Engine", held: HeldJob, index: int) -> bool:
        """Whether a request can start. If another process can do a part of that, it begins here."""
        if index not in held.prepared:
            preparation = engine.preparation(held.job.requests[index])
            if preparation is None:
                return True
            held.prepared[index] = self._preparer.prepare(preparation, partial(self._is_held, held.claim))
        return held.prepared[index].done()

    def _start(self, engine: "Engine", held: HeldJob, index: int) -> None:
        if not self._is_held(held.claim):  # an earlier request of the job has failed
            return
        job, request = held.job, held.job.requests[index]
        queue_s = max(0.0, self._clock() - job.created_at)  # clocks agree only roughly
        began = time.perf_counter()
        try:
            state = engine.start(held.prepared[index].result() if index in held.prepared else request)
        except Exception as error:
            self._publisher.fail(held.claim, error)
            return
        now = time.perf_counter()
        self._metrics.observe_stage(job.model, "encode", now - began)
        self._precedence.spend(job.is_high, now - began)
        self._add(
            Running(
                held=held,
                index=index,
                state=state,
                queue_s=queue_s,
                encode_s=now - began,
                denoise_began=now,
                virtual_time=self._fair_share.at_start,
                block_seconds=block_seconds(request, engine.cards[job.model]),
            )
        )
