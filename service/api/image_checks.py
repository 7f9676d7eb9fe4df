"""Checks uploaded images in a process of its own: decoding 25 million pixels would delay every other answer."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from service.api.input_image import checked_image
from service.running.sandbox import Sandbox

_PROCESS_BYTES = 400_000_000
_PIXEL_BYTES = 24
"""Bytes of the process: its imports, and six copies of an image with transparency. Three are made."""


class ImageChecks:
    """One image at a time, which bounds memory. Used in one event loop, until `close`."""

    def __init__(self, max_pixels: int) -> None:
        self._check = partial(checked_image, max_pixels=max_pixels)
        self._max_bytes = _PROCESS_BYTES + _PIXEL_BYTES * max_pixels
        self._sandbox = Sandbox()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="images")

    async def checked(self, data: bytes) -> bytes:
        """The PNG of `checked_image`. Raises InvalidImage."""
        check = partial(self._sandbox.run, self._check, data, max_bytes=self._max_bytes)
        return await asyncio.get_running_loop().run_in_executor(self._thread, check)

    def close(self) -> None:
        """End, with the check that is running."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._sandbox.close()
