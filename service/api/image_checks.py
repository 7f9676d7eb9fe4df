"""Checks uploaded images in a process of its own: decoding 25 million pixels would delay every other answer."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from service.api.input_image import checked_image
from service.api.input_mask import checked_mask
from service.running.sandbox import Sandbox

_PROCESS_BYTES = 400_000_000
_PIXEL_BYTES = 24
"""Bytes of the process: its imports, and six copies of an image with transparency. Three are made."""


class ImageChecks:
    """One image at a time, which bounds memory. Used in one event loop, until `close`."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self._max_bytes = _PROCESS_BYTES + _PIXEL_BYTES * max_pixels
        self._sandbox = Sandbox()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")

    async def checked(self, data: bytes, field: str) -> bytes:
        """The PNG of `checked_image`. Raises InvalidImage."""
        return await self._run(partial(checked_image, data, field, max_pixels=self._max_pixels))

    async def checked_mask(self, data: bytes, size: tuple[int, int]) -> bytes:
        """The PNG of `checked_mask`. Raises InvalidImage."""
        return await self._run(partial(checked_mask, data, size, max_pixels=self._max_pixels))

    async def _run(self, check: Callable[[], bytes]) -> bytes:
        run = partial(self._sandbox.run, check, max_bytes=self._max_bytes)
        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def close(self) -> None:
        """End, with the check that is running."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._sandbox.close()
