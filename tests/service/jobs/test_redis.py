"""What the store in Redis does beyond the contract of all stores: it outlives versions, and broken records."""

import asyncio
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.processes import RedisServer
from models.card import ImageCard
from models.request import ImageEdit, ImageRequest
from service.errors import JobUnreadable, StoreUnavailable
from service.jobs.job import FailureReason, Job, JobSnapshot, JobState, JobStatus
from service.jobs.redis import RedisStore
from service.jobs.redis_operations import connect
from service.jobs.redis_records import RECORD_VERSION
from service.jobs.results import RedisResults
from service.jobs.shared_clock import SharedClock
from service.jobs.store import Claim, Ending, EventName, Fit, Idempotency, ended, follow
from service.scheduling.fleet import Load, ModelLoad, WorkerRecord, WorkerState
from tests.fixtures.job_records import FAILURE, MESH, RECEIPT, dump, play, restore, scenario_jobs

pytestmark = [pytest.mark.anyio, pytest.mark.redis]

MakeJob = Callable[..., Job]
LEASE_S = 0.05
VERSION_1 = json.loads((Path(__file__).parent / "version_1_records.json").read_text())
ONE_RUNNING = Load({"drawn": ModelLoad(num_running=1, running_s=2.0)})
EDIT = ImageEdit((b"abc",), mask=b"d", strength=0.5)
_names = itertools.count()


@dataclass
class Shared:
    """A store, and its Redis. `errors` has the names of the operations that failed."""

    store: RedisStore
    redis: Any
    prefix: str
    errors: list[str] = field(default_factory=list)

    async def claim(self) -> Claim:
        claim = await self.claim_if_any()
        assert claim is not None
        return claim

    async def claim_if_any(self) -> Claim | None:
        return await self.store.claim(lambda _: Fit.NOW)

    async def set_in_job(self, job_id: str, **fields: Any) -> None:
        """Change fields of a job's fixed record; None deletes one."""
        key = f"{self.prefix}job:{job_id}"
        record = {**json.loads(await self.redis.hget(key, "job")), **fields}
        kept = {name: value for name, value in record.items() if value is not None}
        await self.redis.hset(key, "job", json.dumps(kept))

    async def let_die(self, *claims: Claim) -> None:
        """Let the leases of these claims run out."""
        await self.redis.zadd(f"{self.prefix}leases", {claim.job.id: 1 for claim in claims})


Share = Callable[..., Awaitable[Shared]]


@pytest.fixture
async def share(redis_server: RedisServer) -> AsyncIterator[Share]:
    """A store on keys of this test's own, with a local clock."""
    prefix = f"own{next(_names)}:"
    stores: list[RedisStore] = []

    async def open_store(clock: Callable[[], float] = lambda: 1000.5) -> Shared:
        redis: Any = connect(redis_server.url)
        errors: list[str] = []
        store = RedisStore(
            redis,
            RedisResults(redis, ttl_s=60.0, max_bytes=10_000, on_error=errors.append, prefix=prefix),
            job_ttl_s=60.0,
            events_ttl_s=60.0,
            lease_s=LEASE_S,
            max_attempts=2,
            clock=SharedClock(clock),
            on_error=errors.append,
            prefix=prefix,
        )
        stores.append(store)
        while (await redis.info("server"))["uptime_in_seconds"] < LEASE_S:
            await asyncio.sleep(0.1)
        return Shared(store, redis, prefix, errors)

    yield open_store
    for store in stores:
        await store.close()


@pytest.fixture
async def shared(share: Share) -> Shared:
    return await share()


async def break_missing_field(shared: Shared) -> None:
    await shared.set_in_job("broken", output=None)


async def break_unknown_priority(shared: Shared) -> None:
    await shared.set_in_job("broken", priority="urgent")


async def break_unknown_rule(shared: Shared) -> None:
    await set_in_point(shared, rule="guess")


async def break_point(shared: Shared) -> None:
    await set_in_point(shared, relative_seconds="quick")


async def break_steps(shared: Shared) -> None:
    await set_in_point(shared, steps={"computed": 3})


async def set_in_point(shared: Shared, **fields: Any) -> None:
    (request,) = json.loads(await shared.redis.hget(f"{shared.prefix}job:broken", "job"))["requests"]
    await shared.set_in_job("broken", requests=[{**request, "point": {**request["point"], **fields}}])


async def break_model(shared: Shared) -> None:
    (request,) = json.loads(await shared.redis.hget(f"{shared.prefix}job:broken", "job"))["requests"]
    await shared.set_in_job("broken", model="other", requests=[{**request, "model": "other"}])


async def break_requests(shared: Shared) -> None:
    await shared.set_in_job("broken", requests=[])


async def break_json(shared: Shared) -> None:
    await shared.redis.hset(f"{shared.prefix}job:broken", "job", b"\xff{")


async def break_hash(shared: Shared) -> None:
    await shared.redis.hdel(f"{shared.prefix}job:broken", "job")


async def break_state(shared: Shared) -> None:
    await shared.redis.hset(f"{shared.prefix}job:broken", "num_steps", "many")


async def break_kind(shared: Shared) -> None:
    (kind,) = await shared.redis.hkeys(f"{shared.prefix}kinds")
    name = b"0" * 16 + kind[16:]
    await shared.redis.hset(f"{shared.prefix}kinds", name, '{"model": "drawn"}')
    entry = json.loads(await shared.redis.hget(f"{shared.prefix}counted", "broken"))
    await shared.redis.hset(f"{shared.prefix}counted", "broken", json.dumps([*entry[:-1], name.decode()]))
    await shared.redis.zrem(f"{shared.prefix}queue:{kind.decode()}", "broken")
    await shared.redis.zadd(f"{shared.prefix}queue:{name.decode()}", {"broken": 1})
    await shared.redis.zadd(f"{shared.prefix}heads", {name: 1})


BREAKS = (
    break_missing_field,
    break_unknown_priority,
    break_unknown_rule,
    break_point,
    break_steps,
    break_requests,
    break_json,
    break_hash,
    break_state,
)


@pytest.mark.parametrize("break_record", BREAKS)
async def test_queued_job_that_cannot_be_read_fails_alone(break_record: Any, shared: Shared, make_job: MakeJob) -> None:
    for number, name in enumerate(("broken", "whole")):
        await shared.store.add(replace(make_job(name), created_at=float(number)))
    await break_record(shared)
    # When a worker claims a job, then it gets the other one
    assert (await shared.claim()).job.id == "whole"
    # Then the broken one has ended, and its client hears of it
    assert (await shared.store.events("broken", "0-0"))[-1].data == {"status": "failed"}
    with pytest.raises(JobUnreadable, match="broken"):
        await ended(shared.store, "broken")
    assert [live.job.id for live in await shared.store.live_jobs()] == ["whole"]
    assert shared.errors == ["read"]


async def test_page_of_jobs_is_full_although_one_cannot_be_read(shared: Shared, make_job: MakeJob) -> None:
    for name in ("oldest", "broken", "newest"):
        await shared.store.add(make_job(name))
    await break_json(shared)
    assert [found.job.id for found in await shared.store.jobs(None, limit=2)] == ["newest", "oldest"]


@pytest.mark.parametrize("break_record", [break_kind, break_model])
async def test_job_whose_kind_is_not_its_own_fails_alone(break_record: Any, shared: Shared, make_job: MakeJob) -> None:
    for number, name in enumerate(("broken", "whole")):
        await shared.store.add(replace(make_job(name), created_at=float(number)))
    await break_record(shared)
    assert (await shared.claim()).job.id == "whole"
    assert await shared.store.load() == ONE_RUNNING
    state = (await shared.store.get("broken")).state
    assert state.failure is not None
    assert (state.status, state.failure.reason) == (JobStatus.FAILED, FailureReason.GENERATION_FAILED)


async def test_running_job_that_cannot_be_read_fails_when_its_workers_have_died(
    shared: Shared, make_job: MakeJob
) -> None:
    for name in ("broken", "whole"):
        await shared.store.add(make_job(name))
    await shared.let_die(await shared.claim(), await shared.claim())
    assert set((await shared.store.recover()).requeued) == {"broken", "whole"}
    await shared.let_die(await shared.claim(), await shared.claim())
    await break_missing_field(shared)
    recovery = await shared.store.recover()
    assert [failed.job.id for failed in recovery.failed] == ["whole"]
    assert await shared.redis.hget(f"{shared.prefix}job:broken", "status") == b"failed"
    assert await shared.store.live_jobs() == []


async def test_job_whose_record_is_gone_holds_nothing_up(shared: Shared, make_job: MakeJob) -> None:
    for number, name in enumerate(("queued", "running", "whole")):
        await shared.store.add(replace(make_job(name), created_at=float(number)))
    queued, running, whole = [await shared.claim() for _ in range(3)]
    await shared.store.release(queued)
    await shared.redis.delete(f"{shared.prefix}job:queued", f"{shared.prefix}job:running")
    await shared.let_die(running, whole)
    assert (await shared.store.recover()).requeued == ("whole",)
    assert (await shared.claim()).job.id == "whole"
    assert await shared.store.claim(lambda _: Fit.NOW) is None
    assert await shared.store.end(Ending(running, JobStatus.SUCCEEDED, artifacts=(b"late",))) is None
    assert await shared.store.load() == ONE_RUNNING
    assert shared.errors == []


@pytest.mark.parametrize("is_deleted", [False, True])
async def test_job_that_ended_without_leaving_the_queue_is_not_claimed(
    is_deleted: bool, shared: Shared, make_job: MakeJob
) -> None:
    """As a process of the version before leaves it, which knows nothing of the queues of kinds."""
    await shared.store.add(make_job("broken"))
    await shared.redis.hset(f"{shared.prefix}job:broken", "status", "cancelled")
    if is_deleted:
        await shared.redis.delete(f"{shared.prefix}job:broken")
    assert await shared.store.claim(lambda _: Fit.NOW) is None
    for name in ("heads", "kinds", "counted", "load"):
        assert await shared.redis.exists(f"{shared.prefix}{name}") == 0
    assert await shared.redis.exists(f"{shared.prefix}job:broken:events") == (not is_deleted)


async def test_webhook_of_a_job_that_cannot_be_read_is_given_up(shared: Shared, make_job: MakeJob) -> None:
    for name in ("broken", "whole"):
        await shared.store.add(replace(make_job(name), webhook_url="https://hooks.example/"))
        await shared.store.cancel(name)
    await break_missing_field(shared)
    taken = await shared.store.take_webhook()
    assert taken is not None
    assert taken[0].job.id == "whole"
    assert await shared.redis.zrange(f"{shared.prefix}webhooks", 0, -1) == [b"whole"]


async def test_idempotency_key_of_a_job_whose_record_is_gone_makes_another(shared: Shared, make_job: MakeJob) -> None:
    same = Idempotency("owner", "key", "print")
    await shared.store.add(make_job("a"), same)
    await shared.redis.delete(f"{shared.prefix}job:a")
    assert await shared.store.find(same) is None
    assert (await shared.store.add(make_job("b"), same)).id == "b"
    found = await shared.store.find(same)
    assert found is not None
    assert found.id == "b"


async def test_strange_messages_and_events_are_passed_over(shared: Shared, make_job: MakeJob) -> None:
    queued = asyncio.Event()
    await shared.store.open(on_queued=queued.set, on_cancelled=lambda job_id: None)
    channel = f"{shared.prefix}worker:{shared.store.worker_id}"
    while await shared.redis.publish(channel, b"\xff") == 0:  # until the store listens
        await asyncio.sleep(0.001)
    await shared.redis.publish(channel, b"cancelled")
    await shared.store.add(make_job("a"))
    await shared.redis.xadd(f"{shared.prefix}job:a:events", {"name": "job.dreamt", "data": "{}"})
    await shared.redis.xadd(f"{shared.prefix}job:a:events", {"name": "job.progress", "data": "{"})
    await shared.store.cancel("a")
    async with asyncio.timeout(20):
        await queued.wait()
        events = [event.name async for event in follow(shared.store, "a")]
    assert events == [EventName.QUEUED, EventName.ENDED]


async def test_job_of_a_newer_version_is_left_to_newer_processes(shared: Shared, make_job: MakeJob) -> None:
    with pytest.MonkeyPatch.context() as newer:
        newer.setattr("service.jobs.redis_records.version_of", lambda job: RECORD_VERSION + 1)
        newer.setattr("service.jobs.redis.version_of", lambda job: RECORD_VERSION + 1)
        await shared.store.add(make_job("newer"))
    await shared.store.add(replace(make_job("whole"), created_at=1.0))
    assert (await shared.claim()).job.id == "whole"
    assert await shared.store.claim(lambda _: Fit.NOW) is None
    with pytest.raises(StoreUnavailable, match="newer"):  # which clients try again
        await shared.store.get("newer")
    assert await shared.store.positions(["newer"]) == [0]


async def test_edits_are_left_to_versions_that_know_them(shared: Shared, make_job: MakeJob) -> None:
    """A worker of the version before passes over kinds of version 3, as the test before this one shows."""
    await shared.store.add(make_job("edit", edit=EDIT))
    await shared.store.add(make_job("image"))
    assert await versions(shared, "edit", "image") == [(3, 3), (2, 2)]


async def versions(shared: Shared, *names: str) -> list[tuple[int, int]]:
    """The versions of the jobs' records and of their kinds."""
    fields = [await shared.redis.hmget(f"{shared.prefix}job:{name}", "version", "kind") for name in names]
    return [(int(version), json.loads(kind)["version"]) for version, kind in fields]


@pytest.mark.parametrize("sizes", ["[3]", "[4]", "[3, 0, 1]", "many"])
async def test_edit_whose_pictures_cannot_be_told_apart_fails_alone(
    sizes: str, shared: Shared, make_job: MakeJob
) -> None:
    await shared.store.add(make_job("broken", edit=EDIT))
    await shared.store.add(replace(make_job("whole"), created_at=1.0))
    await shared.redis.set(f"{shared.prefix}job:broken:picture", b"abcd")
    await shared.redis.hset(f"{shared.prefix}job:broken", "picture_sizes", sizes)
    assert (await shared.claim()).job.id == "whole"
    assert (await ended(shared.store, "broken")).state.status is JobStatus.FAILED
    assert shared.errors == ["read"]


async def test_job_whose_pictures_are_gone_is_not_run(shared: Shared, make_job: MakeJob) -> None:
    """They go if the job is cancelled while a worker claims it."""
    await shared.store.add(make_job("cancelled", edit=EDIT))
    await shared.store.add(replace(make_job("whole"), created_at=1.0))
    await shared.redis.delete(f"{shared.prefix}job:cancelled:picture")
    assert (await shared.claim()).job.id == "whole"
    assert shared.errors == []


async def test_transparent_images_are_left_to_versions_that_know_them(shared: Shared, make_job: MakeJob) -> None:
    """A worker of the version before passes over kinds of version 3, as the test before this one shows."""
    await shared.store.add(make_job("transparent", is_transparent=True))
    await shared.store.add(make_job("opaque"))
    new = (RECORD_VERSION, RECORD_VERSION)
    assert await versions(shared, "transparent", "opaque") == [new, (2, 2)]
    (request,) = (await shared.store.get("transparent")).job.requests
    assert isinstance(request, ImageRequest)
    assert request.is_transparent


async def test_records_of_the_version_before_are_read_as_they_were_written(
    shared: Shared, make_job: MakeJob, forecasting_card: ImageCard
) -> None:
    jobs = scenario_jobs(make_job, forecasting_card)
    await restore(shared.redis, shared.prefix, VERSION_1)
    snapshots = {name: await shared.store.get(name) for name in jobs}
    assert {name: snapshot.job for name, snapshot in snapshots.items()} == {
        name: job.without_input_images() for name, job in jobs.items()
    }
    assert {snapshot.state.status for snapshot in snapshots.values()} == set(JobStatus)
    assert snapshots["succeeded"].state.receipts == (RECEIPT,)
    assert snapshots["failed"].state.failure == FAILURE
    assert (await shared.store.content("succeeded")).artifacts == (b"mesh",)
    assert [event.name async for event in follow(shared.store, "failed")] == list(EventName)
    found = await shared.store.find(Idempotency("key", "wish", "print"))
    assert found is not None
    assert found.id == "queued"
    taken = await shared.store.take_webhook()
    assert taken is not None
    assert taken[0].job.id == "succeeded"
    await shared.redis.zadd(f"{shared.prefix}leases", {"running": 1})  # its worker has died
    assert (await shared.store.recover()).requeued == ("running",)
    assert [(await shared.claim()).job for _ in range(3)] == [jobs[name] for name in ("queued", "mesh", "running")]


async def test_version_before_can_read_the_records(
    shared: Shared, make_job: MakeJob, forecasting_card: ImageCard
) -> None:
    """It ignores fields that it does not know. So all that it wrote must be there, and mean the same.

    But it leaves queued jobs to newer workers: it had one queue for all kinds of jobs.
    """
    await play(shared.store, scenario_jobs(make_job, forecasting_card))
    await shared.store.renew([])
    written = await dump(shared.redis, shared.prefix)
    names = {name for name in VERSION_1 if not name.startswith(("result:", "workers", "queue", "live"))}
    assert names <= written.keys()
    for name in names:
        assert_contains(written[name], VERSION_1[name], name)


def assert_contains(new: Any, old: Any, path: str) -> None:
    """All that `old` has is in `new`, except values that differ from run to run."""
    if path.rpartition(".")[2] in ("ended_by", "lease", "content") or path.startswith(("leases", "result")):
        assert type(new) is type(old)
    elif isinstance(old, str) and old.startswith(("{", "[")):
        assert_contains(json.loads(new), json.loads(old), path)
    elif isinstance(old, dict):
        assert old.keys() <= new.keys(), path
        for name in old:
            assert_contains(new[name], old[name], f"{path}.{name}")
        assert path.rpartition(".")[2] not in ("policy", "steps") or old.keys() == new.keys()  # these it reads strictly
    elif path.endswith(".stream"):
        assert_contains([fields for _, fields in new], [fields for _, fields in old], path.removesuffix(".stream"))
    elif isinstance(old, list):
        for index, (new_item, old_item) in enumerate(zip(new, old, strict=True)):
            assert_contains(new_item, old_item, f"{path}.{index}")
    else:
        assert new == old, path


async def test_record_of_version_0_1_is_readable(shared: Shared, make_job: MakeJob) -> None:
    # Given a job whose fixed record also has the fields of its state
    job = make_job("a")
    await shared.store.add(job)
    await shared.set_in_job("a", status="queued", started_at=0, steps_done=0, attempts=0, receipts=[])
    # Then it is read as before
    assert await shared.store.get("a") == JobSnapshot(job, JobState())


@pytest.fixture
async def full(shared: Shared) -> AsyncIterator[Callable[[int], Awaitable[None]]]:
    """Limits the memory of Redis to so many bytes; 0 is no limit."""

    async def limit(size_bytes: int) -> None:
        await shared.redis.config_set("maxmemory", size_bytes)

    yield limit
    await limit(0)


async def test_full_redis_takes_no_new_work_and_loses_none(
    shared: Shared, make_job: MakeJob, full: Callable[[int], Awaitable[None]]
) -> None:
    for name in ("a", "b"):
        await shared.store.add(make_job(name))
    first, second = await shared.claim(), await shared.claim()
    await shared.let_die(first, second)
    await full(1)
    for refused in (
        shared.store.check(),
        shared.store.add(make_job("c")),
        shared.store.end(Ending(first, JobStatus.SUCCEEDED, artifacts=(b"image",))),
    ):
        with pytest.raises(StoreUnavailable, match=r"maxmemory'$"):
            await refused
    assert shared.errors == ["check", "add", "put_results"]
    # Its backlog can be read, and jobs stay with their workers, and those without a result end
    assert (await shared.store.load()).of("drawn").num_running == 2
    assert await shared.store.renew([first, second]) == set()
    assert (await shared.store.recover()).requeued == ()
    await shared.store.release(second)
    assert (await shared.store.cancel("b"))[1]
    # When there is room again, the result is stored after all
    await full(0)
    await shared.store.check()
    await shared.store.end(Ending(first, JobStatus.SUCCEEDED, artifacts=(b"image",)))
    assert (await shared.store.content("a")).artifacts == (b"image",)


async def test_replica_is_not_ready(shared: Shared, make_job: MakeJob) -> None:
    await shared.redis.replicaof("127.0.0.1", 1)  # where no Redis listens
    try:
        with pytest.raises(StoreUnavailable, match="read only replica"):
            await shared.store.check()
        with pytest.raises(StoreUnavailable, match="read only replica"):
            await shared.store.add(make_job("a"))
    finally:
        await shared.redis.replicaof("NO", "ONE")
    await shared.store.check()


async def test_servers_whose_clocks_differ_agree_on_times_and_places(share: Share, make_job: MakeJob) -> None:
    # Given a server whose clock is days behind, and one whose clock is days ahead
    behind, ahead = [await share(lambda skew_s=skew_s: time.time() + skew_s) for skew_s in (-1e6, 1e6)]
    for server in (behind, ahead):
        await server.store.renew([])
    for server, name, latency_s in ((ahead, "first", 600), (behind, "second", 700)):
        now = server.store.clock()
        await server.store.add(replace(make_job(name), created_at=now, deadline_at=now + latency_s))
    # Then jobs are claimed in the order of their deadlines, and their times are comparable
    claim = await behind.claim()
    state = (await ahead.store.get("first")).state
    assert claim.job.id == "first"
    assert state.started_at is not None
    assert abs(state.started_at - claim.job.created_at) < 300
    assert claim.job.deadline_at is not None
    assert 300 < claim.job.deadline_at - behind.store.clock() < 900


async def test_record_of_a_worker_that_cannot_be_read_is_passed_over(
    share: Share, drawn_card: ImageCard, caplog: pytest.LogCaptureFixture
) -> None:
    readers, announced = await share(), []
    for _ in range(8):
        server = await share()
        record = WorkerRecord(server.store.worker_id, "1", "cpu", WorkerState.IDLE, {"drawn": drawn_card})
        await server.store.announce(record)
        await server.redis.zadd(f"{server.prefix}workers", {record.id: math.inf})
        announced.append(record)
    key = f"{readers.prefix}worker_records"
    entries = [json.loads(await readers.redis.hget(key, record.id)) for record in announced]
    # Given records of a newer version, broken ones, and some whose cards can't be read
    await readers.redis.hset(key, announced[0].id, json.dumps({**entries[0], "speed": 3}))
    await readers.redis.hset(key, announced[1].id, json.dumps({**entries[1], "state": "dreaming"}))
    await readers.redis.hset(key, announced[2].id, b"{")
    await readers.redis.set(f"{readers.prefix}card:other", b'{"modality": "video"}')
    await readers.redis.hset(key, announced[3].id, json.dumps({**entries[3], "cards": {"drawn": "other"}}))
    await readers.redis.hset(key, announced[4].id, json.dumps({**entries[4], "pace": math.nan}))
    await readers.redis.hset(key, announced[5].id, json.dumps({**entries[5], "finish_s": {"drawn": -1.0}}))
    card = json.loads(await readers.redis.get(f"{readers.prefix}card:{entries[6]['cards']['drawn']}"))
    await readers.redis.set(f"{readers.prefix}card:slow", json.dumps({**card, "dense_step_seconds": math.inf}))
    await readers.redis.hset(key, announced[6].id, json.dumps({**entries[6], "cards": {"drawn": "slow"}}))
    await readers.redis.hset(
        key, announced[7].id, json.dumps({**entries[7], "cards": {"x": entries[7]["cards"]["drawn"]}})
    )
    for _ in range(2):
        found = {record.id: record for record in await readers.store.workers()}
    without_cards = {record.id: replace(record, cards={}) for record in (announced[3], *announced[6:])}
    assert found == {announced[0].id: announced[0], **without_cards}
    assert len(caplog.records) == 6  # one line for each that can't be read
    # And all are forgotten when their leases have ended
    await readers.redis.zadd(f"{readers.prefix}workers", {record.id: 1 for record in announced})
    assert await readers.store.workers() == []


async def test_idle_worker_is_woken_by_a_job_of_its_models_and_does_not_look_before(
    share: Share, make_job: MakeJob, drawn_card: ImageCard
) -> None:
    first, second, api = await share(), await share(), await share()
    woken: dict[str, asyncio.Event] = {}
    for server in (first, second):
        name = server.store.worker_id
        woken[name] = asyncio.Event()
        await server.store.open(on_queued=woken[name].set, on_cancelled=lambda job_id: None)
        await server.store.announce(WorkerRecord(name, "1", "cpu", WorkerState.IDLE, {"drawn": drawn_card}))
        while await server.redis.publish(f"{server.prefix}worker:{name}", b"") == 0:  # until it listens
            await asyncio.sleep(0.001)
    async with asyncio.timeout(20):
        await asyncio.sleep(0.05)
        for server in (first, second):
            assert await server.claim_if_any() is None
            woken[server.store.worker_id].clear()
        # A job of another model wakes nobody, and one of theirs the one that has been idle for longer
        await api.store.add(replace(make_job("other"), model="ball", requests=(MESH,)))
        await api.store.add(make_job("a"))
        await woken[first.store.worker_id].wait()
        assert not woken[second.store.worker_id].is_set()
        assert await second.claim_if_any() is None  # without a look at the queue
        # If it does not fit there, the next one is woken
        assert await first.store.claim(lambda _: Fit.NO) is None
        await woken[second.store.worker_id].wait()
        assert (await second.claim()).job.id == "a"


async def test_jobs_of_the_version_before_are_found(shared: Shared, make_job: MakeJob) -> None:
    """Its servers may add jobs while newer ones run, and its processes may queue a newer job again."""
    await shared.store.add(make_job("requeued"))
    await shared.claim()
    await shared.redis.hset(f"{shared.prefix}job:requeued", "status", "queued")
    await shared.redis.hdel(f"{shared.prefix}job:requeued", "lease")
    await shared.redis.zadd(f"{shared.prefix}queue", {"requeued": 5.0, "gone": 1.0, "broken": 2.0})
    await shared.redis.zrem(f"{shared.prefix}leases", "requeued")
    await shared.redis.hset(f"{shared.prefix}job:broken", mapping={"status": "queued", "place": "2.0"})
    await shared.store.recover()
    assert (await shared.store.load()).of("drawn") == ModelLoad(1, 0, queued_s=2.0)
    assert await shared.redis.hget(f"{shared.prefix}job:broken", "status") == b"failed"
    assert (await shared.claim()).job.id == "requeued"
    assert await shared.redis.exists(f"{shared.prefix}queue", f"{shared.prefix}live") == 0


async def test_cancelled_job_of_the_version_before_is_counted_no_more(shared: Shared, make_job: MakeJob) -> None:
    for name in ("a", "b"):
        await shared.store.add(make_job(name))
    await shared.redis.hset(f"{shared.prefix}job:a", "status", "cancelled")
    await shared.store.recover()
    assert (await shared.store.load()).of("drawn").num_queued == 1
