"""Embedded prompts, kept for requests that have the same text."""

from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from threading import Lock

from models.state import BranchInputs


class PromptCache:
    """The prompts of all models of a process, on the host. Any thread may use it.

    Those used last are kept, in at most `max_bytes`. Each model's empty prompt, which most negative prompts are, stays
    for ever and does not count. Texts are not kept, but their hashes are.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._entries: OrderedDict[bytes, BranchInputs] = OrderedDict()
        self._empty: dict[str, BranchInputs] = {}
        self._lock = Lock()

    def clear(self) -> None:
        """Forget all prompts, the empty ones too."""
        with self._lock:
            self._entries.clear()
            self._empty.clear()
            self._num_bytes = 0

    def look_up(self, model: str, prompt: str, encode: Callable[[], BranchInputs]) -> tuple[BranchInputs, bool]:
        """What `encode` returns for `prompt`, or has returned earlier. The second value says whether it was earlier.

        What is found here is on the host. Raises what `encode` raises.
        """
        key = sha256(f"{model}\0{prompt}".encode()).digest()
        with self._lock:
            known = self._entries.get(key) if prompt else self._empty.get(model)
            if key in self._entries:
                self._entries.move_to_end(key)
        if known is not None:
            return known, True
        encoded = encode()
        kept = encoded.on("cpu")
        with self._lock:
            if not prompt:
                self._empty[model] = kept
            elif key not in self._entries:
                self._entries[key] = kept
                self._num_bytes += kept.num_bytes
                while self._num_bytes > self._max_bytes:
                    _, dropped = self._entries.popitem(last=False)
                    self._num_bytes -= dropped.num_bytes
        return encoded, False
