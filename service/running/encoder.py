"""Encodes prompts and images beside the denoise steps."""

import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from models.request import GenerationRequest
from service.jobs.store import Claim
from service.metrics import Metrics
from service.running.device_use import DeviceUse
from service.running.held import EncodedRequest, HeldJob
from service.running.priority_thread import PriorityThread
from service.running.sandbox import NotWanted

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine


class Encoder:
    """One thread for each model, which takes one request after the other, those of high priority first.

    A text encoder's numbers can differ with what is encoded in the same call, and no request may change another's
    result. So they are not batched.
    """

    def __init__(self, metrics: Metrics, device: DeviceUse, is_wanted: Callable[[Claim], bool]) -> None:
        self._metrics = metrics
        self._device = device
        self._is_wanted = is_wanted
        self._threads: defaultdict[str, PriorityThread] = defaultdict(partial(PriorityThread, "encoder"))
        self._is_closed = False

    def encode(self, engine: "Engine", held: HeldJob, request: GenerationRequest) -> Future[EncodedRequest]:
        """What `request` of a job starts from; NotWanted, or what the engine raises. A job is encoded once."""
        job = held.job
        return self._threads[job.model].submit(job.is_urgent, self._encode, engine, held, request)

    def _encode(self, engine: "Engine", held: HeldJob, request: GenerationRequest) -> EncodedRequest:
        if self._is_closed or not self._is_wanted(held.claim):
            raise NotWanted
        began = time.perf_counter()
        encoded = self._device.call(lambda: engine.encode(request, held.branches))
        if held.branches is None:
            lookups = [branch.was_cached for branch in encoded.branches if branch.was_cached is not None]
            self._metrics.observe_prompts(held.job.model, lookups)
        held.branches = encoded.branches
        return EncodedRequest(encoded, time.perf_counter() - began)

    def close(self) -> None:
        """Return when what is being encoded is done. The rest is not wanted any more."""
        self._is_closed = True
        for thread in self._threads.values():
            thread.close()
