"""How a worker claims jobs from the queues in Redis, with few attempts that find nothing."""

import asyncio
import json
import random
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.jobs.redis_records import KindEntry, load_kind, model_of
from service.jobs.redis_scripts import COMMON
from service.jobs.store import MOST_KINDS, Fit, Fits, JobKind

_POLL_S = 8.0
"""Messages can be lost, so an idle worker looks at the queues at this interval."""
_POLL_WAITING_S = 1.0
"""How often a worker looks while jobs wait that do not fit. It is not woken for others of their class then."""


# ARGV: worker, lease, its ms, time, JSON of `models`, those it has or nothing, and of `fits`, which says of each kind
# that it knows `now`, `waits` or `no`.
# Returns the id and the kind of the claimed job or '', the fields of its record, the kinds of those that wait, and the
# names and JSON of kinds that the worker has to judge before it gets a job.
# A worker that gets no job is idle in all classes that have no job. If jobs of a class wait, they do not fit; then
# another idle worker is woken.
CLAIM = (
    COMMON
    + """
local worker, lease, asked = ARGV[1], ARGV[2], cjson.decode(ARGV[5])
local latest = prefix .. 'claim:' .. worker
local done = redis.call('GET', latest)
if done and string.sub(done, 1, #lease + 1) == lease .. ' ' then
    local id = string.sub(done, #lease + 2)
    if not is_mine(id, lease) then return {'', '', {}, {}, {}} end
    local entry = cjson.decode(redis.call('HGET', prefix .. 'counted', id))
    return {id, entry[7], redis.call('HGETALL', prefix .. 'job:' .. id), {}, {}}
end
local models = {}
for _, model in ipairs(asked.models) do models[model] = true end

local function look()
    local waiting, unknown, first, is_held_up, from = {}, {}, nil, false, 0
    while true do
        local kinds = redis.call('ZRANGE', prefix .. 'heads', from, from + 63)
        for _, kind in ipairs(kinds) do
            if models[string.sub(kind, 18)] or #asked.models == 0 then
                local fit = asked.fits[kind]
                table.insert(waiting, kind)
                if not fit then
                    table.insert(unknown, kind)
                    table.insert(unknown, redis.call('HGET', prefix .. 'kinds', kind) or '')
                elseif fit == 'waits' then
                    is_held_up = true
                elseif fit == 'now' and #unknown == 0 and not is_held_up and not first then
                    first = kind
                end
            end
        end
        from = from + 64
        if first or #kinds < 64 or #unknown >= 128 then return waiting, unknown, first end
    end
end

while true do
    local waiting, unknown, kind = look()
    if not kind then
        if #unknown > 0 then return {'', '', {}, waiting, unknown} end
        local has_jobs = {}
        for _, waits in ipairs(waiting) do has_jobs[class_of(waits)] = true end
        for class in pairs(has_jobs) do wake(class) end
        rest(worker, asked.models, has_jobs)
        return {'', '', {}, waiting, {}}
    end
    local id = redis.call('ZRANGE', prefix .. 'queue:' .. kind, 0, 0)[1]
    local job = prefix .. 'job:' .. id
    if is_gone(id) or redis.call('HGET', job, 'status') ~= 'queued' then
        let_go(id)
        dequeue(id, kind)
    else
        for _, model in ipairs(asked.models) do
            redis.call('ZREM', prefix .. 'idle:h' .. model, worker)
            redis.call('ZREM', prefix .. 'idle:n' .. model, worker)
        end
        dequeue(id, kind)
        redis.call('HSET', job, 'status', 'running', 'lease', lease, 'worker', worker, 'started_at', ARGV[4],
            'steps_done', 0)
        redis.call('HINCRBY', job, 'attempts', 1)
        redis.call('ZADD', prefix .. 'leases', now_ms() + ARGV[3], id)
        redis.call('SET', latest, lease .. ' ' .. id, 'PX', 60000)
        recount(id, 'running')
        tell(id, 'job.started', '{}')
        return {id, kind, redis.call('HGETALL', job), {}, {}}
    end
end
"""
)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A claimed job: its fields in Redis, and the kind by which the worker chose it; None if that can't be read."""

    job_id: str
    lease: str
    kind: JobKind | None
    fields: Mapping[bytes, bytes]


class Claims:
    """The claims of one worker. After `wake`, the next call looks at the queues.

    A worker that finds nothing is put down as idle by the same script. A new job wakes one idle worker of its class, so
    there is no need to look before that. If jobs wait that do not fit, they are remembered. There is no need to look
    before one of them fits.
    """

    def __init__(self, redis: Any, prefix: str, worker_id: str, *, lease_ms: int) -> None:
        self.models: Sequence[str] = ()
        """The models of this worker, once it has announced them."""
        self.num_looks = 0
        """How often it looked at the queues."""
        self._worker_id = worker_id
        self._prefix = prefix
        self._claim = redis.register_script(CLAIM)
        self._lease_ms = lease_ms
        self._known: dict[str, KindEntry | None] = {}  # entries that can't be read are None
        self._waiting: list[str] = []
        self._looks_at = 0.0
        self._is_woken = False
        self._lock = asyncio.Lock()  # a repeated script finds only the latest claim again

    def wake(self) -> None:
        self._is_woken = True

    def rest(self, num_looks: int) -> None:
        """Another script has put the worker down as idle, since nothing is queued. `num_looks` is from before that."""
        if num_looks == self.num_looks:
            self._sleep([])

    async def claim(self, fits: Fits, started_at: float) -> Claimed | None:
        async with self._lock:
            asked: dict[JobKind, Fit] = {}

            def fit_of(name: str) -> Fit:
                entry = self._known[name]
                if entry is None:
                    return Fit.NOW  # to fail the job
                if entry.is_newer:
                    return Fit.NO
                if entry.kind not in asked:
                    asked[entry.kind] = fits(entry.kind)
                return asked[entry.kind]

            if not self._is_worth_a_look(fit_of):
                return None
            if len(self._known) > MOST_KINDS:
                self._known.clear()
            self._waiting, self._looks_at, self.num_looks = [], 0.0, self.num_looks + 1
            lease, num_judged = uuid.uuid4().hex, 0
            verdicts: dict[str, str] = {}
            while True:
                self._is_woken = False  # here, since it may be woken again before the answer arrives
                new = (name for name in self._known if name not in verdicts and self._may_have(name))
                verdicts.update((name, fit_of(name).value) for name in new)
                question = json.dumps({"models": self.models, "fits": verdicts})
                arguments = [self._worker_id, lease, self._lease_ms, started_at, question]
                job_id, kind, fields, waiting, unknown = await self._claim(keys=[self._prefix], args=arguments)
                if job_id:
                    entry = self._known.get(kind.decode())
                    pairs = dict(zip(fields[::2], fields[1::2], strict=True))
                    return Claimed(job_id.decode(), lease, None if entry is None else entry.kind, pairs)
                self._learn(unknown)
                if not unknown or num_judged >= MOST_KINDS:
                    self._sleep([name.decode() for name in waiting])
                    return None
                num_judged += len(unknown) // 2

    def _is_worth_a_look(self, fit_of: Callable[[str], Fit]) -> bool:
        if self._is_woken or time.monotonic() >= self._looks_at:
            return True
        fits = (fit_of(name) for name in self._waiting)
        return next((fit for fit in fits if fit is not Fit.NO), Fit.NO) is Fit.NOW

    def _sleep(self, waiting: list[str]) -> None:
        if self.models:  # else it is not woken
            self._waiting = waiting
            # Not all workers at once
            self._looks_at = time.monotonic() + random.uniform(0.5, 1.0) * (_POLL_WAITING_S if waiting else _POLL_S)

    def _may_have(self, name: str) -> bool:
        return not self.models or model_of(name) in self.models

    def _learn(self, unknown: Sequence[bytes]) -> None:
        for name, data in zip(unknown[::2], unknown[1::2], strict=True):
            self._known[name.decode()] = load_kind(data)
