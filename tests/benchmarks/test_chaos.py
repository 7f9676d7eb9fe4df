"""What a run of chaos counts as a fault."""

import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from PIL import Image

from benchmarks.chaos.clients import Outcome, events_of
from benchmarks.chaos.cluster import Exits, Member
from benchmarks.chaos.tasks import Kind, random_tasks
from benchmarks.chaos.verdict import Findings, judge_job, judge_logs, judge_redis
from benchmarks.chaos.webhooks import Behaviour, WebhookHost, webhook_host
from benchmarks.processes import RedisServer
from tests.fixtures.waiting import wait_until


def png(colour: str, side: int = 16) -> bytes:
    file = BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "PNG")
    return file.getvalue()


def outcome(status: str, *, kind: Kind = Kind.POLLED, message: str = "", files: tuple[bytes, ...] = ()) -> Outcome:
    task = next(task for task in random_tasks(40, 1) if task.kind is kind)
    return Outcome(task, status=status, job_id="job_1", message=message, files=files)


def faults_of(
    ended: Outcome,
    *,
    expected: tuple[bytes, ...] | None = (),
    is_emptied: bool = False,
    is_comparable: bool = True,
    befell: int = 0,
) -> list[str]:
    findings = Findings()
    findings.befell["worker killed"] = befell
    judge_job(ended, expected, findings, is_emptied=is_emptied, is_comparable=is_comparable)
    assert findings.jobs[ended.task.kind] == {ended.status: 1}
    return findings.faults


@pytest.mark.parametrize("status", ["failed", "gone", "stuck", "unexpected", "cancelled", "refused"])
def test_end_that_nothing_explains_is_a_fault(status: str) -> None:
    (fault,) = faults_of(outcome(status, message="an error"))
    assert f"is {status}: an error" in fault


def test_job_may_be_gone_only_if_redis_was_emptied() -> None:
    assert faults_of(outcome("gone"), is_emptied=True) == []
    assert faults_of(outcome("failed"), is_emptied=True)


def test_failure_is_explained_by_enough_dead_workers() -> None:
    dead = outcome("failed", message="job … failed: all 10 workers that tried it died")
    assert faults_of(dead, befell=10) == []
    assert faults_of(dead, befell=9)


def test_job_whose_shape_has_no_surface_must_fail() -> None:
    assert faults_of(outcome("failed", kind=Kind.MESH, message="the shape has no surface"), expected=None) == []
    assert faults_of(outcome("succeeded", kind=Kind.MESH), expected=None)


def test_only_clients_that_cancel_may_find_their_job_cancelled() -> None:
    assert faults_of(outcome("cancelled", kind=Kind.CANCELLED)) == []


@pytest.mark.parametrize(
    ("files", "is_wrong"),
    [((png("red"),), False), ((png("blue"),), True), ((png("red", 32),), True), ((), True)],
)
def test_other_files_than_those_of_the_seed_are_faults(files: tuple[bytes, ...], is_wrong: bool) -> None:
    assert bool(faults_of(outcome("succeeded", files=files), expected=(png("red"),))) is is_wrong


def test_file_that_cannot_be_compared_must_have_the_right_size() -> None:
    for side, is_wrong in ((16, False), (32, True)):
        ended = outcome("succeeded", files=(png("white", side),))
        assert bool(faults_of(ended, expected=(png("black"),), is_comparable=False)) is is_wrong


def test_tasks_are_those_of_their_seed_and_of_every_kind() -> None:
    assert random_tasks(30, 1) == random_tasks(30, 1) != random_tasks(30, 2)
    assert {task.kind for task in random_tasks(16, 1)} == {*Kind}
    assert {task.webhook for task in random_tasks(200, 1)} == {None, *Behaviour}


def test_process_that_ends_by_itself_is_a_fault_and_starts_again(tmp_path: Path) -> None:
    exits = Exits()
    member = Member("serve", 0, tmp_path / "log", {"ELASTIC_MODELS": "nowhere"})
    first = member.process.process
    wait_until(lambda: first.poll() is not None)
    exits.notice([member])
    assert exits.counts == {f"serve: by itself, {first.returncode}": 1}
    assert "there is no model directory" in exits.faults[0]
    assert member.process.process is not first
    member.is_expected_to_end = True
    member.process.kill()
    exits.notice([member])
    assert len(exits.faults) == 1


def test_event_that_breaks_off_is_left_out() -> None:
    lines = ["event: job.queued", "id: 1-0", 'data: {"a": 1}', "", ": still here", "", "event: job.started", "data: {"]
    assert [*events_of(lines)] == [("job.queued", "1-0", {"a": 1})]


@pytest.fixture
def empty_redis(redis_server: RedisServer) -> Iterator[Any]:
    """A database of its own."""
    client = redis.Redis.from_url(redis_server.url.removesuffix("/0") + "/7")
    client.flushdb()
    yield client
    client.flushdb()


def put_job(client: Any, job_id: str, *, ends: int = 1) -> None:
    for _ in range(ends):
        client.xadd(f"elastic:job:{job_id}:events", {"name": "job.ended", "data": "{}"})
    client.hset(f"elastic:job:{job_id}", "attempts", 1)
    for key in (f"elastic:job:{job_id}", f"elastic:job:{job_id}:events"):
        client.expire(key, 60)


@pytest.mark.redis
def test_redis_that_holds_ended_jobs_only_is_in_order(empty_redis: Any) -> None:
    put_job(empty_redis, "job_1")
    empty_redis.zadd("elastic:workers", {"worker": 1})
    findings = Findings()
    judge_redis(empty_redis, [outcome("succeeded")], 0.0, findings)
    assert findings.faults == []
    assert findings.attempts == {1: 1}
    assert findings.keys.total() == 3


@pytest.mark.redis
@pytest.mark.parametrize(
    ("leave", "fault"),
    [
        (lambda client: client.zadd("elastic:queue", {"job_1": 1}), "Redis holds queue"),
        (lambda client: client.set("elastic:job:job_1:picture", "a"), "Redis holds job:job_1:picture"),
        (lambda client: client.persist("elastic:job:job_1"), "Redis holds job:job_1 for ever"),
        (lambda client: put_job(client, "job_2"), "no client was told"),
        (lambda client: client.delete("elastic:job:job_1"), "no longer in Redis"),
        (lambda client: put_job(client, "job_1"), "ended 2 times"),
    ],
)
def test_anything_else_in_redis_is_a_fault(leave: Any, fault: str, empty_redis: Any) -> None:
    put_job(empty_redis, "job_1")
    leave(empty_redis)
    findings = Findings()
    judge_redis(empty_redis, [outcome("succeeded")], 0.0, findings)
    assert any(fault in found for found in findings.faults)


@pytest.mark.redis
def test_jobs_from_before_redis_was_emptied_may_be_missing(empty_redis: Any) -> None:
    findings = Findings()
    judge_redis(empty_redis, [outcome("succeeded")], time.monotonic(), findings)
    assert findings.faults == []


def call(host: WebhookHost, behaviour: Behaviour, number: int) -> httpx2.Response:
    headers = {"webhook-id": "job_1", "webhook-timestamp": "1", "webhook-signature": "v1,none"}
    body = {"type": "job.succeeded", "data": {"id": "job_1"}}
    return httpx2.post(host.url(behaviour, number), json=body, headers=headers, timeout=1)


def test_webhook_host_answers_badly_once_and_checks_signatures() -> None:
    with webhook_host() as host:
        assert call(host, Behaviour.ERROR, 1).status_code == 500
        assert call(host, Behaviour.REDIRECT, 2).status_code == 307
        with pytest.raises(httpx2.DecodingError):
            call(host, Behaviour.GARBAGE, 3)
        assert call(host, Behaviour.WELL, 4).status_code == 204
        for number, behaviour in ((1, Behaviour.ERROR), (2, Behaviour.REDIRECT), (3, Behaviour.GARBAGE)):
            assert call(host, behaviour, number).status_code == 204
        assert host.calls[1] == ["job.succeeded", "job.succeeded"]
        assert "not signed" in host.faults[0]


def test_errors_in_logs_are_counted_and_an_aborted_interpreter_is_a_fault(tmp_path: Path) -> None:
    log = tmp_path / "serve0.log"
    log.write_text("12:00 ERROR service: job_1 broke\n12:01 ERROR service: job_2 broke\nFatal Python error: a lock\n")
    findings = Findings()
    judge_logs([log], findings)
    assert findings.log_errors == {"service: … broke": 2}
    assert findings.faults == ["serve0.log: Fatal Python error: a lock"]
