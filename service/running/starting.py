"""Starts of requests: their preparation, the encoding of their prompt or image, and their first place in the steps."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from threading import RLock
from typing import TYPE_CHECKING

from models.errors import DeviceLost
from models.request import GenerationRequest
from service.jobs.store import Claim
from service.running.encoder import Encoder
from service.running.held import EncodedRequest, HeldJob, Running
from service.running.parts import WorkerParts
from service.running.preparer import Preparer
from service.scheduling.cost import block_seconds

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine


class Starter:
    """Used by the worker's thread, but for `begin`.

    `classes` says of those that want the device whether they are of high priority. `claim_place` says whether there is
    room for request `index` of a job, which then counts as started; `add` takes it when it runs. `on_ready` is called
    in some thread when one can start or has failed.
    """

    def __init__(
        self,
        parts: WorkerParts,
        *,
        classes: Callable[[], set[bool]],
        claim_place: Callable[[HeldJob, int], bool],
        add: Callable[[Running], None],
        is_held: Callable[[Claim], bool],
        on_ready: Callable[[], None],
    ) -> None:
        self._parts = parts
        self._classes = classes
        self._claim_place = claim_place
        self._add = add
        self._is_held = is_held
        self._on_ready = on_ready
        self._preparer = Preparer(on_ready)
        self._encoder = Encoder(parts.metrics, parts.device, is_held)
        self._lock = RLock()  # one thread at a time begins; a preparation that ends at once goes on in the same call
        self._is_closed = False

    def begin(self, engine: "Engine", held: HeldJob) -> None:
        """Prepare and encode a job's requests, as far as that may go now. It goes on beside the steps.

        Any thread may call this.
        """
        with self._lock:
            for index in [*held.unstarted]:
                if not self._is_closed and index not in held.encoding:
                    self._begin(engine, held, index)

    def start_what_fits(self, engine: "Engine", jobs: Iterable[HeldJob]) -> None:
        """Start what is encoded, where there is room. Jobs whose input can't be used fail, whether there is or not.

        Raises DeviceLost.
        """
        for held in jobs:
            self.begin(engine, held)
            for index in [*held.unstarted]:
                if not self._is_held(held.claim):  # one of its requests has failed
                    break
                for stage in (held.prepared.get(index), held.encoding.get(index)):
                    if stage is not None and stage.done() and isinstance(error := stage.exception(), Exception):
                        self._fail(held.claim, error)
                        break
                else:
                    encoding = held.encoding.get(index)
                    if encoding is not None and encoding.done() and self._claim_place(held, index):
                        self._start(engine, held, index, encoding.result())

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        self._preparer.close()
        self._encoder.close()

    def _begin(self, engine: "Engine", held: HeldJob, index: int) -> None:
        request: GenerationRequest = held.job.requests[index]
        if index not in held.prepared and (preparation := engine.preparation(request)):
            held.prepared[index] = self._preparer.prepare(preparation, partial(self._is_held, held.claim))
            held.prepared[index].add_done_callback(lambda _: self.begin(engine, held))
            return
        if (prepared := held.prepared.get(index)) is not None:
            if not prepared.done() or prepared.exception():
                return
            request = prepared.result()
        if self._has_device_time(engine, held):
            held.encoding[index] = self._encoder.encode(engine, held, request)
            held.encoding[index].add_done_callback(lambda _: self._on_ready())

    def _has_device_time(self, engine: "Engine", held: HeldJob) -> bool:
        """Whether a request may be encoded now, which is charged to it. It must not slow those of high priority."""
        job = held.job
        if held.encoding or held.branches is not None or not engine.encodes_on_device(job.model):
            return True
        needed_s = engine.cards[job.model].encode_seconds
        if not job.is_high and len(self._classes()) == 2 and not self._parts.precedence.are_owed(needed_s):
            return False
        self._parts.precedence.spend(job.is_high, needed_s)
        return True

    def _start(self, engine: "Engine", held: HeldJob, index: int, encoding: EncodedRequest) -> None:
        job, request = held.job, held.job.requests[index]
        began = time.perf_counter()
        try:
            state = self._parts.device.call(lambda: engine.start(request, encoded=encoding.encoded))
        except Exception as error:
            self._fail(held.claim, error)
            return
        now = time.perf_counter()
        encode_s = encoding.seconds + now - began
        self._parts.metrics.observe_stage(job.model, "encode", encode_s)
        running = Running(
            held=held,
            index=index,
            state=state,
            queue_s=max(0.0, self._parts.clock() - job.created_at - encode_s),  # clocks agree only roughly
            encode_s=encode_s,
            denoise_began=now,
            block_seconds=block_seconds(request, engine.cards[job.model]),
        )
        running.join(self._parts.fair_share)
        self._add(running)
        held.encoding.pop(index)
        held.prepared.pop(index, None)
        if not held.unstarted:
            held.branches = None

    def _fail(self, claim: Claim, error: Exception) -> None:
        """End a job because of `error`. Nobody's job fails because the device is lost."""
        if isinstance(error, DeviceLost):
            raise error
        self._parts.publisher.fail(claim, error)
