"""Stores the artifacts of finished jobs for a limited time and size: in memory, in Redis, or on a volume (fsspec)."""

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

from pydantic import Field, FiniteFloat, TypeAdapter
from redis.asyncio import Redis

from service.errors import ResultExpired, StoreUnavailable
from service.jobs.redis_operations import CHECK_LIMIT_S, RESULTS_LIMIT_S, RedisOperations

logger = logging.getLogger(__name__)


class Results(Protocol):
    """The artifacts of jobs. Each attempt at a job has a `key` of its own, so a late worker overwrites nothing.

    If the results grow too large, the oldest are deleted first; the newest stays, however large. All methods raise
    StoreUnavailable if the results cannot be reached or written.
    """

    async def put(self, key: str, files: Sequence[bytes]) -> None: ...

    async def get(self, key: str) -> tuple[bytes, ...]:
        """Raises ResultExpired if the result has been deleted."""
        ...

    async def check(self) -> None:
        """Raise StoreUnavailable if nothing can be written."""
        ...


def _expired(key: str, ttl_s: float) -> ResultExpired:
    job_id = key.partition("/")[0]
    return ResultExpired(f"the content of job {job_id} is no longer kept; results live {ttl_s:g} s at most")


@dataclass(frozen=True, slots=True)
class _Kept:
    files: tuple[bytes, ...]
    size_bytes: int
    expires_at: float


class MemoryResults:
    """Results in this process's memory."""

    def __init__(self, *, ttl_s: float, max_bytes: int, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._kept: dict[str, _Kept] = {}
        self._size_bytes = 0

    async def put(self, key: str, files: Sequence[bytes]) -> None:
        size_bytes = sum(map(len, files))
        if (before := self._kept.pop(key, None)) is not None:
            self._size_bytes -= before.size_bytes
        self._kept[key] = _Kept(tuple(files), size_bytes, self._clock() + self._ttl_s)
        self._size_bytes += size_bytes
        self._drop_old()

    async def get(self, key: str) -> tuple[bytes, ...]:
        self._drop_old()
        if key not in self._kept:
            raise _expired(key, self._ttl_s)
        return self._kept[key].files

    async def check(self) -> None:
        pass

    def _drop_old(self) -> None:
        now = self._clock()
        for key, kept in list(self._kept.items()):  # in the order of arrival
            is_too_much = self._size_bytes > self._max_bytes and len(self._kept) > 1
            if kept.expires_at > now and not is_too_much:
                break
            del self._kept[key]
            self._size_bytes -= kept.size_bytes


# KEYS: results (zset: key -> when it was put), sizes (hash: key -> bytes), total (bytes), result:<key>
# ARGV: key, ms to live, maximal bytes, prefix of result keys, size, files…
_PUT = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local function forget(key)
    redis.call('DECRBY', KEYS[3], redis.call('HGET', KEYS[2], key) or 0)
    redis.call('HDEL', KEYS[2], key)
    redis.call('ZREM', KEYS[1], key)
    redis.call('DEL', ARGV[4] .. key)
end
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then forget(ARGV[1]) end
redis.call('RPUSH', KEYS[4], unpack(ARGV, 6))
redis.call('PEXPIRE', KEYS[4], ARGV[2])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[5])
redis.call('INCRBY', KEYS[3], ARGV[5])
for _, key in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])) do forget(key) end
while tonumber(redis.call('GET', KEYS[3])) > tonumber(ARGV[3]) and redis.call('ZCARD', KEYS[1]) > 1 do
    forget(redis.call('ZRANGE', KEYS[1], 0, 0)[1])
end
"""


class RedisResults:
    """Results in Redis. `on_error` is called with the name of every operation that fails."""

    def __init__(
        self,
        redis: Redis,
        *,
        ttl_s: float,
        max_bytes: int,
        on_error: Callable[[str], None],
        prefix: str = "elastic:",
    ) -> None:
        self._operation = RedisOperations(on_error)
        self._redis: Any = redis  # redis-py's types leave open whether answers are bytes or texts
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._prefix = prefix
        self._put = redis.register_script(_PUT)

    async def put(self, key: str, files: Sequence[bytes]) -> None:
        results = f"{self._prefix}result:"
        keys = [f"{self._prefix}{name}" for name in ("results", "result_sizes", "results_bytes")]
        arguments: list[Any] = [key, int(self._ttl_s * 1000), self._max_bytes, results, sum(map(len, files)), *files]
        async with self._operation("put_results", RESULTS_LIMIT_S):
            await self._put(keys=[*keys, results + key], args=arguments)

    async def get(self, key: str) -> tuple[bytes, ...]:
        async with self._operation("get_results", RESULTS_LIMIT_S):
            files = await self._redis.lrange(f"{self._prefix}result:{key}", 0, -1)
        if not files:
            raise _expired(key, self._ttl_s)
        return tuple(files)

    async def check(self) -> None:
        """Nothing: the job store, in the same Redis, checks it."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """The file `entry.json` of a result on a volume: when it was put there, and what belongs to it."""

    put_at: FiniteFloat
    num_files: Annotated[int, Field(ge=1)]
    size_bytes: int


_ENTRY = TypeAdapter(_Entry)
_NUM_THREADS = 4
_PROBE_BYTES = 4096
# The ids of jobs and the names of leases. The volume may hold what others put there, which is left alone.
_OWN_FOLDER = re.compile(r"/job_[0-9a-f]{32}/[0-9a-f]{32}$")


class VolumeResults:
    """Results in files of a volume, such as `file:///srv/results` or `s3://bucket/results`, one folder for each key.

    Old results are deleted each time a tenth of the time to live or of the size limit has been used up. Servers that
    share a volume need a common `clock`. `on_error` is called with the name of every operation that fails.
    """

    def __init__(
        self,
        url: str,
        *,
        ttl_s: float,
        max_bytes: int,
        on_error: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        # Of its own: on a volume that does not answer, threads wait for ever.
        self._threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="results")
        self._on_error = on_error
        self._files: Any
        import fsspec  # only where there is a volume: it takes an eighth of an API node's start

        self._files, self._root = fsspec.core.url_to_fs(url)
        self._ttl_s = ttl_s
        self._max_bytes = max_bytes
        self._clock = clock
        self._looked_at = clock()
        self._put_since = 0  # bytes
        self._incomplete: dict[str, float] = {}  # folders without an entry, and since when they are known

    async def put(self, key: str, files: Sequence[bytes]) -> None:
        await self._in_thread("put_results", RESULTS_LIMIT_S, self._put, key, files)

    async def get(self, key: str) -> tuple[bytes, ...]:
        files: tuple[bytes, ...] = await self._in_thread("get_results", RESULTS_LIMIT_S, self._get, key)
        return files

    async def check(self) -> None:
        await self._in_thread("check", CHECK_LIMIT_S, self._write_probe)

    async def _in_thread(self, name: str, limit_s: float, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(limit_s):
                return await asyncio.get_running_loop().run_in_executor(self._threads, call, *arguments)
        except ResultExpired:
            raise
        except Exception as error:  # file systems raise the errors of their own libraries too
            self._on_error(name)
            raise StoreUnavailable(f"the volume of results fails: {_reason(error)}; try again in a moment") from error

    def _write_probe(self) -> None:
        probe = f"{self._root}/check-{uuid.uuid4().hex}"
        self._files.makedirs(self._root, exist_ok=True)
        try:
            self._files.pipe_file(probe, bytes(_PROBE_BYTES))
        finally:
            with suppress(OSError):
                self._files.rm_file(probe)

    def _put(self, key: str, files: Sequence[bytes]) -> None:
        folder = f"{self._root}/{key}"
        size_bytes = sum(map(len, files))
        try:
            self._files.makedirs(folder, exist_ok=True)
            for index, data in enumerate(files):
                self._files.pipe_file(f"{folder}/{index}", data)
            # Renamed last: a folder without this file is incomplete.
            entry = {"put_at": self._clock(), "num_files": len(files), "size_bytes": size_bytes}
            part = f"{folder}/{uuid.uuid4().hex}.part"
            self._files.pipe_file(part, json.dumps(entry).encode())
            self._files.mv(part, f"{folder}/entry.json")
        except Exception:
            self._remove(folder)  # a part of a result would only fill the volume
            raise
        self._put_since += size_bytes
        if self._put_since > self._max_bytes / 10 or self._clock() - self._looked_at > self._ttl_s / 10:
            self._put_since, self._looked_at = 0, self._clock()
            self._drop_old()

    def _get(self, key: str) -> tuple[bytes, ...]:
        folder = f"{self._root}/{key}"
        entry = self._entry(folder)
        if entry is None or entry.put_at + self._ttl_s <= self._clock():
            raise _expired(key, self._ttl_s)
        try:
            files = tuple(self._files.cat_file(f"{folder}/{index}") for index in range(entry.num_files))
        except FileNotFoundError as error:  # deleted meanwhile, perhaps by another server
            raise _expired(key, self._ttl_s) from error
        if sum(map(len, files)) != entry.size_bytes:
            logger.warning("a result is damaged: %s", folder)
            raise _expired(key, self._ttl_s)
        return files

    def _entry(self, folder: str) -> _Entry | None:
        """None if the folder is incomplete, or its entry is not one."""
        try:
            return _ENTRY.validate_json(self._files.cat_file(f"{folder}/entry.json"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            logger.warning("a result's entry can't be read: %s/entry.json", folder)
            return None

    def _drop_old(self) -> None:
        self._files.invalidate_cache()
        now = self._clock()
        kept, incomplete = [], {}
        for folder in self._files.glob(f"{self._root}/*/*"):
            if (entry := self._entry(folder)) is not None:
                kept.append((entry.put_at, entry.size_bytes, folder))
            elif _OWN_FOLDER.search(folder) is not None:
                # Another server may be writing it. If it stays so, its writer died.
                incomplete[folder] = self._incomplete.get(folder, now)
                if incomplete[folder] + self._ttl_s <= now:
                    self._remove(folder)
        self._incomplete = incomplete
        kept.sort()
        left = sum(size for _, size, _ in kept)
        for put_at, size, folder in kept[:-1]:
            if put_at + self._ttl_s > now and left <= self._max_bytes:
                break
            left -= size
            self._remove(folder)

    def _remove(self, folder: str) -> None:
        """Remove a result, and the folder of its job if no other is in there."""
        with suppress(OSError):  # another server has removed it; or it stays, and is removed later
            self._files.rm(folder, recursive=True)
            self._files.rmdir(folder.rpartition("/")[0])


def _reason(error: Exception) -> str:
    """What went wrong, without paths."""
    if isinstance(error, TimeoutError):
        return "it does not answer"
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__
