"""Checks a run: its jobs, their files and webhooks, and the keys that are left in Redis."""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image

from benchmarks.chaos.clients import Outcome
from benchmarks.chaos.cluster import MAX_ATTEMPTS, Cluster
from benchmarks.chaos.tasks import Kind
from benchmarks.chaos.webhooks import WebhookHost
from service.jobs.job import JobStatus
from service.jobs.redis_operations import PREFIX

MAX_DIFFERENCE = 2
"""Of an image's colours, of 255. Batches of other sizes round differently."""
MAX_MESH_DIFFERENCE = 0.01
"""Of a mesh's volume, as a share of it."""
_ID = r"job_\w+|[0-9a-f]{16,}|\d+"
_LEASES_END_S = 60.0  # many times a lease, for a loaded machine
_WEBHOOKS_END_S = 150.0  # a webhook that a dead server had taken is withheld from the others for a minute

# What Redis may hold once all jobs have ended, by the key after its prefix: whether it must have a time to live.
_KEYS: Mapping[str, bool] = {
    r"job:job_\w+": True,
    r"job:job_\w+:events": True,
    r"key:.*": True,
    r"check": True,
    r"claim:\w+": True,
    r"card:\w+": True,
    r"jobs(:.*)?": False,
    r"expiring": False,
    r"workers|worker_records|idle:.*": False,
    r"webhooks": False,
}


@dataclass
class Findings:
    """What a run showed: ends of jobs by kind, injected faults, ends of processes, and what was wrong.

    `log_errors` counts the lines of level ERROR in the logs by their text, without ids. `left_out` names the faults
    that could not be injected.
    """

    jobs: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    befell: Counter[str] = field(default_factory=Counter)
    exits: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)
    log_errors: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    largest_difference: int = 0
    seconds: float = 0.0

    @property
    def statuses(self) -> Counter[str]:
        return sum(self.jobs.values(), Counter())


def judge_job(
    outcome: Outcome, expected: tuple[bytes, ...] | None, findings: Findings, *, is_emptied: bool, is_comparable: bool
) -> None:
    """Check a job's end. `expected` has its files, None if it fails; `is_emptied`: Redis was emptied since it began."""
    task, status = outcome.task, outcome.status
    name = f"job {task.number} ({task.kind}, {outcome.job_id})"
    findings.jobs[task.kind][status] += 1
    if outcome.message:
        findings.reasons[f"{status}: {re.sub(_ID, '…', outcome.message)[:120]}"] += 1
    match status:
        case JobStatus.SUCCEEDED if expected is None:
            findings.faults.append(f"{name} succeeded, but its shape has no surface")
        case JobStatus.SUCCEEDED:
            assert expected is not None
            _judge_files(name, outcome.files, expected, findings, is_comparable=is_comparable)
        case JobStatus.FAILED if is_explained(outcome.message, findings.befell, fails_alone=expected is None):
            pass
        case JobStatus.CANCELLED if task.kind is Kind.CANCELLED:
            pass
        case "refused" if "deadline_unreachable" in outcome.message:
            pass
        case "gone" if is_emptied:
            pass
        case _:
            findings.faults.append(f"{name} is {status}: {outcome.message}")


def is_explained(message: str, befell: Mapping[str, int], *, fails_alone: bool) -> bool:
    """Whether a job may have failed with `message`: it also fails alone, or too many of its workers ended."""
    if fails_alone:
        return "surface" in message
    ended = sum(count for name, count in befell.items() if name.split()[0] in ("serve", "worker", "redis"))
    return f"all {MAX_ATTEMPTS} workers that tried it died" in message and ended >= MAX_ATTEMPTS


def _judge_files(
    name: str, files: Sequence[bytes], expected: Sequence[bytes], findings: Findings, *, is_comparable: bool
) -> None:
    if len(files) != len(expected):
        findings.faults.append(f"{name} has {len(files)} files, not {len(expected)}")
        return
    for file, alone in zip(files, expected, strict=True):
        if file.startswith(b"\x89PNG"):
            difference = image_difference(file, alone)
            if is_comparable:
                findings.largest_difference = max(findings.largest_difference, difference)
            is_wrong = difference > (MAX_DIFFERENCE if is_comparable else 255)
        else:
            is_wrong = mesh_difference(file, alone) > (MAX_MESH_DIFFERENCE if is_comparable else 0.5)
        if is_wrong:
            findings.faults.append(f"a file of {name} is not the one that its seed makes alone")


def image_difference(file: bytes, expected: bytes) -> int:
    """The largest difference of a colour, of 255; 256 for another size."""
    pixels, others = (np.asarray(Image.open(BytesIO(data)).convert("RGB"), dtype=np.int16) for data in (file, expected))
    return int(np.abs(pixels - others).max()) if pixels.shape == others.shape else 256


def mesh_difference(file: bytes, expected: bytes) -> float:
    """The difference of two meshes' volumes and sizes, as a share."""
    mesh, other = (trimesh.load_mesh(BytesIO(data), file_type="stl") for data in (file, expected))
    return max(abs(mesh.volume / other.volume - 1), float(np.abs(mesh.extents / other.extents - 1).max()))


def judge_redis(client: Any, outcomes: Sequence[Outcome], emptied_at: float, findings: Findings) -> None:
    """Check the keys in Redis. All jobs that began after `emptied_at`, its last emptying, must be there."""
    deadline = time.monotonic() + _LEASES_END_S
    while client.zcard(f"{PREFIX}leases") and time.monotonic() < deadline:
        time.sleep(0.1)
    for key in client.scan_iter(f"{PREFIX}*", count=1000):
        name = key.decode().removeprefix(PREFIX)
        kind = next((kind for kind in _KEYS if re.fullmatch(kind, name)), None)
        findings.keys[kind or name] += 1
        if kind is None:
            findings.faults.append(f"Redis holds {name}, though all jobs have ended")
        elif _KEYS[kind] and client.ttl(key) == -1:
            findings.faults.append(f"Redis holds {name} for ever")
    found = {key.decode().removeprefix(f"{PREFIX}job:") for key in client.scan_iter(f"{PREFIX}job:*", _type="hash")}
    ids = [outcome.job_id for outcome in outcomes if outcome.job_id]
    due = {outcome.job_id for outcome in outcomes if outcome.job_id and outcome.began > emptied_at}
    findings.faults += [f"job {job_id} is in Redis, but no client was told of it" for job_id in found.difference(ids)]
    findings.faults += [f"job {job_id} is no longer in Redis" for job_id in due - found]
    if len(set(ids)) < len(ids):
        findings.faults.append("two calls with different keys were given the same job")
    for job_id in found.intersection(ids):
        _judge_record(client, job_id, findings)


def _judge_record(client: Any, job_id: str, findings: Findings) -> None:
    """A job has ended exactly once, as far as its events are still kept."""
    events = [fields[b"name"] for _, fields in client.xrange(f"{PREFIX}job:{job_id}:events")]
    if events and events.count(b"job.ended") != 1:
        findings.faults.append(f"job {job_id} ended {events.count(b'job.ended')} times")
    findings.attempts[int(client.hget(f"{PREFIX}job:{job_id}", "attempts") or 0)] += 1


def judge_webhooks(host: WebhookHost, outcomes: Iterable[Outcome], cluster: Cluster, findings: Findings) -> None:
    """Every webhook of an ended job must have been called, unless Redis was emptied since."""
    due = {
        outcome.task.number: outcome
        for outcome in outcomes
        if outcome.task.webhook is not None and outcome.status in [*JobStatus]
    }
    deadline = time.monotonic() + _WEBHOOKS_END_S
    while time.monotonic() < deadline and not all(
        host.calls[number] or cluster.is_emptied_since(outcome.began) for number, outcome in due.items()
    ):
        cluster.exits.notice(cluster.members)
        time.sleep(0.2)
    for number, outcome in due.items():
        calls = host.calls[number]
        if not calls and not cluster.is_emptied_since(outcome.began):
            findings.faults.append(f"the webhook of job {number} ({outcome.task.webhook}) was not called")
        if {*calls} - {f"job.{outcome.status}"}:
            findings.faults.append(f"the webhook of job {number}, which is {outcome.status}, was told {calls}")
    findings.faults += host.faults


def judge_logs(logs: Iterable[Path], findings: Findings) -> None:
    """Count the lines of level ERROR by their text, without ids and numbers. An interpreter that aborted is a fault."""
    for log in logs:
        for line in log.read_text(errors="replace").splitlines():
            if " ERROR " in line:
                text = line.partition(" ERROR ")[2]
                findings.log_errors[re.sub(_ID, "…", text)[:160]] += 1
            elif line.startswith("Fatal Python error"):
                findings.faults.append(f"{log.name}: {line}")
