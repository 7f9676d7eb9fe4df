"""Prepares the input images of held requests in a process of its own, before the worker's thread starts them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from models.request import GenerationRequest
from service.running.sandbox import Sandbox

_PROCESS_BYTES = 2_000_000_000
"""Half of it is enough for an image of 2048 by 2048 pixels, to which larger uploads are scaled down, and torch."""


class Preparer:
    """One image at a time, which bounds memory. `on_prepared` is called in its thread."""

    def __init__(self, on_prepared: Callable[[], None]) -> None:
        self._on_prepared = on_prepared
        self._sandbox = Sandbox()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="preparer")

    def prepare(
        self, preparation: Callable[[], GenerationRequest], is_wanted: Callable[[], bool]
    ) -> Future[GenerationRequest]:
        """The request that `preparation` returns; NotWanted, SandboxFailed, or what it raises."""
        run = partial(self._sandbox.run, preparation, max_bytes=_PROCESS_BYTES, is_wanted=is_wanted)
        prepared = self._thread.submit(run)
        prepared.add_done_callback(lambda _: self._on_prepared())
        return prepared

    def close(self) -> None:
        """End, with the preparation that is running."""
        self._sandbox.close()
        self._thread.shutdown(cancel_futures=True)
