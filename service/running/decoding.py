"""From the last step of a request to the publisher. A mesh's field is decoded in turns between the steps of others."""

import logging
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from models.errors import DeviceLost, OutOfDeviceMemory
from models.mesh.surface import FieldSamples
from service.running.held import DECODE_TURN_S, Running
from service.running.parts import WorkerParts
from service.running.publisher import Decoded, Denoised

if TYPE_CHECKING:  # models.engine brings torch, which the API side never loads
    from models.engine import Engine
    from models.state import DenoiseState

logger = logging.getLogger(__name__)


class Decoder:
    """Used by the worker's thread. It lets go of requests that the publisher has, and of those that fail, by `let_go`.

    `on_artifact` is called in some thread when an artifact is finished, and its memory is free.
    """

    def __init__(
        self, parts: WorkerParts, *, let_go: Callable[[Running], None], on_artifact: Callable[[], None]
    ) -> None:
        self._parts = parts
        self._let_go = let_go
        self._on_artifact = on_artifact

    def begin(self, engine: "Engine", running_now: Sequence[Running]) -> None:
        """Begin the decoding of requests that took their last step. The publisher does what takes no turns."""
        room = self._parts.room
        for running in [running for running in running_now if running.state.is_done and running.decoding is None]:
            running.denoise_ended = running.denoise_ended or time.perf_counter()
            decoding = engine.decode_in_turns(running.state)
            if decoding is not None:
                if room.for_grid(running, running_now):
                    running.decoding = decoding
            elif room.for_decoding(running, running_now):
                self._publish(running, partial(engine.finish, running.state))
            else:
                return  # those behind it wait as well, so that it gets its turn

    def take_turn(self, engine: "Engine", running: Running, decoding: Generator[None, None, FieldSamples]) -> None:
        """Give a mesh its turn. Raises DeviceLost."""
        candidate, began = running.as_candidate(), time.perf_counter()
        try:
            with self._parts.device.shared():
                while time.perf_counter() - began < DECODE_TURN_S:
                    next(decoding)
        except StopIteration as end:
            samples: FieldSamples = end.value
            self._publish(running, lambda: samples)
        except DeviceLost:
            raise
        except OutOfDeviceMemory as error:
            logger.warning("%s; it is decoded at once", error)
            running.decoding = None  # it begins again, and takes its memory then
            self._publish(running, partial(_whole_field, engine, running.state))
        except Exception as error:
            self._let_go(running)
            self._parts.publisher.fail(running.claim, error)
        seconds = time.perf_counter() - began
        self._parts.precedence.spend(candidate.is_high, seconds, has_deadline=running.job.deadline_at is not None)
        running.spend(self._parts.fair_share, seconds)

    def _publish(self, running: Running, decode: Callable[[], Decoded]) -> None:
        """Hand a request to the publisher."""
        assert running.denoise_ended is not None
        denoised = Denoised(
            claim=running.claim,
            index=running.index,
            decode=decode,
            summary=running.state.summary(),
            queue_s=running.queue_s,
            encode_s=running.encode_s,
            denoise_s=running.denoise_ended - running.denoise_began,
            field_s=time.perf_counter() - running.denoise_ended,
            batch_size_mean=running.batch_size_sum / len(running.state.computed),
            memory=replace(running.memory, decode=0, grid=0) if running.decoding else running.memory,
        )
        self._parts.publisher.publish(denoised, on_artifact=self._on_artifact)
        self._let_go(running)


def _whole_field(engine: "Engine", state: "DenoiseState") -> FieldSamples:
    """The decoding of a mesh from its beginning, in one turn."""
    decoding = engine.decode_in_turns(state)
    assert decoding is not None
    while True:
        try:
            next(decoding)
        except StopIteration as end:
            field: FieldSamples = end.value
            return field
