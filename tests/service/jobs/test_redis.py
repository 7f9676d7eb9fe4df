"""What the store in Redis does beyond the contract of all stores."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.processes import RedisServer
from service.jobs.job import Job, JobSnapshot, JobState
from service.jobs.redis import RedisStore, connect
from service.jobs.results import MemoryResults

pytestmark = [pytest.mark.anyio, pytest.mark.redis]


async def test_job_of_an_earlier_version_is_readable(redis_server: RedisServer, make_job: Callable[..., Job]) -> None:
    # Given a job whose fixed record also has the fields of its state, as version 0.1 wrote them
    redis: Any = connect(redis_server.url)
    results = MemoryResults(ttl_s=1.0, max_bytes=100, clock=lambda: 0.0)
    options: dict[str, Any] = {"job_ttl_s": 10.0, "events_ttl_s": 10.0, "lease_s": 10.0, "max_attempts": 2}
    store = RedisStore(redis, results, **options, clock=lambda: 5.0, on_error=pytest.fail, prefix="earlier:")
    job = make_job("a")
    await store.add(job)
    fixed = json.loads(await redis.hget("earlier:job:a", "job"))
    assert "status" not in fixed
    earlier = {**fixed, "status": "queued", "started_at": None, "steps_done": 0, "attempts": 0, "receipts": []}
    await redis.hset("earlier:job:a", "job", json.dumps(earlier))
    # Then it is read as before
    assert await store.get("a") == JobSnapshot(job, JobState())
    await store.close()
