"""The living workers that share a Redis. The cards of their models are written once and read once."""

import logging
from collections.abc import Callable
from hashlib import sha256
from typing import Any, TypeVar

from models.card import ModelCard
from service.jobs.redis_scripts import COMMON
from service.jobs.worker_records import dump_card, dump_worker, load_card, load_worker
from service.scheduling.fleet import WorkerRecord

logger = logging.getLogger(__name__)

T = TypeVar("T")

# ARGV: worker, ms that it counts as living, ms that its cards are kept, JSON of its record, hashes of its cards…
# Returns the hashes of those that Redis does not have.
_ANNOUNCE = (
    COMMON
    + """
local missing, records = {}, prefix .. 'worker_records'
redis.call('ZREMRANGEBYSCORE', prefix .. 'workers', '-inf', now_ms())
redis.call('ZADD', prefix .. 'workers', now_ms() + ARGV[2], ARGV[1])
redis.call('HSET', records, ARGV[1], ARGV[4])
if redis.call('HLEN', records) > redis.call('ZCARD', prefix .. 'workers') then
    for _, worker in ipairs(redis.call('HKEYS', records)) do
        if not redis.call('ZSCORE', prefix .. 'workers', worker) then redis.call('HDEL', records, worker) end
    end
end
for i = 5, #ARGV do
    if redis.call('PEXPIRE', prefix .. 'card:' .. ARGV[i], ARGV[3]) == 0 then table.insert(missing, ARGV[i]) end
end
return missing
"""
)

# ARGV: worker
_WITHDRAW = (
    COMMON
    + """
redis.call('ZREM', prefix .. 'workers', ARGV[1])
redis.call('HDEL', prefix .. 'worker_records', ARGV[1])
"""
)

# Returns the records of the living workers.
_WORKERS = (
    COMMON
    + """
local ids = redis.call('ZRANGEBYSCORE', prefix .. 'workers', now_ms(), '+inf')
if #ids == 0 then return {} end
return redis.call('HMGET', prefix .. 'worker_records', unpack(ids))
"""
)


class Workers:
    """`lease_ms` is how long a worker that says nothing counts as living."""

    def __init__(self, redis: Any, prefix: str, *, lease_ms: int) -> None:
        self._redis = redis
        self._prefix = prefix
        self._lease_ms = lease_ms
        self._cards_ttl_ms = max(10 * lease_ms, 60_000)
        self._announce = redis.register_script(_ANNOUNCE)
        self._withdraw = redis.register_script(_WITHDRAW)
        self._workers = redis.register_script(_WORKERS)
        self._written: dict[str, tuple[ModelCard, str, bytes]] = {}  # by model: its card, the card's hash and JSON
        self._read: dict[str, ModelCard | None] = {}  # by hash; None if this version can't read it
        self._unreadable: set[bytes] = set()

    async def announce(self, worker_id: str, record: WorkerRecord) -> None:
        for model, card in record.cards.items():
            if model not in self._written or self._written[model][0] is not card:
                data = dump_card(card)
                self._written[model] = (card, sha256(data).hexdigest()[:32], data)
        cards = {self._written[model][1]: self._written[model][2] for model in record.cards}
        data = dump_worker(record, {model: self._written[model][1] for model in record.cards})
        arguments = [worker_id, self._lease_ms, self._cards_ttl_ms, data, *cards]
        for name in await self._announce(keys=[self._prefix], args=arguments):
            await self._redis.set(self._card_key(name.decode()), cards[name.decode()], px=self._cards_ttl_ms)

    async def withdraw(self, worker_id: str) -> None:
        await self._withdraw(keys=[self._prefix], args=[worker_id])

    async def living(self) -> list[WorkerRecord]:
        """A record or a card that this version can't read is left out, with one line in the log."""
        texts = [data for data in await self._workers(keys=[self._prefix]) if data is not None]
        self._unreadable &= set(texts)
        entries = [entry for entry in (self._load(load_worker, data) for data in texts) if entry is not None]
        names = {name for entry in entries for name in entry.cards.values()}
        self._read = {name: card for name, card in self._read.items() if name in names}
        if missing := [name for name in names if name not in self._read]:
            found = await self._redis.mget([self._card_key(name) for name in missing])
            for name, data in zip(missing, found, strict=True):
                if data is not None:
                    self._read[name] = self._load(load_card, data)
        cards = {name: card for name, card in self._read.items() if card is not None}
        return [
            entry.record(
                {model: cards[name] for model, name in entry.cards.items() if name in cards and cards[name].id == model}
            )
            for entry in entries
        ]

    def _load(self, load: Callable[[bytes], T], data: bytes) -> T | None:
        try:
            return load(data)
        except ValueError as error:
            if data not in self._unreadable:
                logger.warning("what a worker says of itself is passed over: %s", error)
                self._unreadable.add(data)
            return None

    def _card_key(self, name: str) -> str:
        return f"{self._prefix}card:{name}"
