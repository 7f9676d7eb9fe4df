"""Finished pictures, kept for a while and up to a size."""

from collections.abc import Callable
from dataclasses import dataclass

from service.errors import ResultExpired


@dataclass(frozen=True, slots=True)
class _Kept:
    pictures: tuple[bytes, ...]
    size_bytes: int
    expires_at: float


class MemoryResults:
    """Results in this process's memory; the oldest go first when they are too many. Not locked: its store does that."""

    def __init__(self, *, ttl_s: float, max_bytes: int, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._kept: dict[str, _Kept] = {}
        self._size_bytes = 0

    def put(self, job_id: str, pictures: tuple[bytes, ...]) -> None:
        size_bytes = sum(len(picture) for picture in pictures)
        self._kept[job_id] = _Kept(pictures, size_bytes, self._clock() + self._ttl_s)
        self._size_bytes += size_bytes
        self._drop_old()

    def get(self, job_id: str) -> tuple[bytes, ...]:
        """Raises ResultExpired for what is no longer kept."""
        self._drop_old()
        if job_id not in self._kept:
            raise ResultExpired(
                f"the content of job {job_id} is no longer kept; results live {self._ttl_s:g} s at most"
            )
        return self._kept[job_id].pictures

    def _drop_old(self) -> None:
        now = self._clock()
        for job_id, kept in list(self._kept.items()):  # in the order of arrival
            if kept.expires_at > now and self._size_bytes <= self._max_bytes:
                break
            del self._kept[job_id]
            self._size_bytes -= kept.size_bytes
