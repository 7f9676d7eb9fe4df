"""Jobs that the version before queued, which had one queue for all kinds of jobs.

Its keys are `queue`, a zset of the ids of queued jobs, and `live`, a hash of the JSON of their kinds and seconds. Its
servers may go on for a while and add jobs, and its processes may put jobs of dead workers there. This module moves the
jobs to the queues of their kinds. It can go with the next version.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import FiniteFloat, TypeAdapter

from service.jobs.redis_records import KindEntry, dump_kind
from service.jobs.redis_scripts import COMMON

_MOST = 200
"""So many jobs are moved at a time, so that leases are renewed in between."""

# ARGV: most. Returns ids, each with its entry or nothing.
_QUEUED = (
    COMMON
    + """
local found = {}
for _, id in ipairs(redis.call('ZRANGE', prefix .. 'queue', 0, ARGV[1] - 1)) do
    table.insert(found, id)
    table.insert(found, redis.call('HGET', prefix .. 'live', id))
end
return found
"""
)

# ARGV: id, kind or '' if the entry can't be read, JSON of the kind, model, microseconds of work.
# Returns the id if nothing says what kind of job it is.
_ADOPT = (
    COMMON
    + """
local id, kind, job = ARGV[1], ARGV[2], prefix .. 'job:' .. ARGV[1]
if redis.call('ZREM', prefix .. 'queue', id) == 0 or is_gone(id) then return false end
if redis.call('HGET', job, 'status') ~= 'queued' then
    let_go(id)
    return false
end
local place, entry = tonumber(redis.call('HGET', job, 'place')) or 0, recount(id, 'queued')
if entry then
    enqueue(id, entry[7], redis.call('HGET', job, 'kind') or '', place)
elseif kind == '' then
    return id
else
    redis.call('HDEL', prefix .. 'live', id)
    redis.call('HSET', job, 'kind', ARGV[3])
    count(id, 'queued', ARGV[4], tonumber(ARGV[5]), redis.call('STRLEN', job .. ':picture'), '', kind)
    enqueue(id, kind, ARGV[3], place)
    redis.call('ZADD', prefix .. 'jobs', now_ms() * 1000, id)
end
return false
"""
)


@dataclass(frozen=True, slots=True)
class _LiveEntry(KindEntry):
    seconds: FiniteFloat = 0.0


_LIVE = TypeAdapter(_LiveEntry)


class Adoption:
    def __init__(self, redis: Any, prefix: str) -> None:
        self._prefix = prefix
        self._queued = redis.register_script(_QUEUED)
        self._adopt = redis.register_script(_ADOPT)

    async def adopt(self) -> list[str]:
        """Move queued jobs of the version before to the queues of their kinds. Returns the ids of unreadable ones."""
        unreadable = []
        found = await self._queued(keys=[self._prefix], args=[_MOST])
        for job_id, data in zip(found[::2], found[1::2], strict=True):
            try:
                entry = None if data is None else _LIVE.validate_json(data)
            except ValueError:
                entry = None
            arguments: list[Any] = [job_id, "", "", "", 0]
            if entry is not None:
                kind, text = dump_kind(KindEntry(entry.model, entry.shape, entry.version, entry.is_high, entry.memory))
                arguments = [job_id, kind, text, entry.model, round(entry.seconds * 1e6)]
            if await self._adopt(keys=[self._prefix], args=arguments) is not None:
                unreadable.append(job_id.decode())
        return unreadable
