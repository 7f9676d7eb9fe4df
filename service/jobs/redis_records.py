"""The records of jobs in Redis: what is written, and how it is read.

Servers and workers of two versions share a Redis while one replaces the other. So readers ignore fields that they do
not know, and read the records of the version before theirs. A change that older readers must not ignore, such as a new
value of an enumeration or a new setting of a rule, raises RECORD_VERSION: they then leave such jobs to newer processes.

Policies are written by the name of their rule, since each rule has its own type of settings.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from typing import Self

from pydantic import TypeAdapter

from models.curve import point_entry, point_of
from models.memory import NO_MEMORY, RequestMemory
from models.request import ImageRequest
from service.errors import JobNotFound, JobUnreadable, StoreUnavailable
from service.jobs.job import Failure, Job, JobSnapshot, JobState, JobStatus, Receipt
from service.jobs.store import Event, EventName, JobKind
from service.order import pictures_of
from service.scheduling.fleet import Load, ModelLoad

RECORD_VERSION = 3
"""The version of the newest records that are read. Records of version 1 do not say theirs."""
_VERSION_OF_OPAQUE_IMAGES_FROM_TEXT = 2

_JOB = TypeAdapter(Job)
_RECEIPTS = TypeAdapter(tuple[Receipt, ...])
_FAILURE = TypeAdapter(Failure)


@dataclass(frozen=True, slots=True)
class KindEntry:
    """What is written of a `JobKind`, and the version of its jobs' records.

    `is_high` says whether it is urgent; earlier versions did not write it for jobs with a deadline. Entries without
    `is_high` or `memory` are of an even earlier one.
    """

    model: str
    shape: str
    version: int = 1
    is_high: bool = False
    memory: RequestMemory = NO_MEMORY

    @property
    def is_newer(self) -> bool:
        """Whether a newer version of the server wrote it, which this one leaves to others."""
        return self.version > RECORD_VERSION

    @property
    def kind(self) -> JobKind:
        return JobKind(self.model, self.shape, self.is_high, self.memory)

    @classmethod
    def of(cls, job: Job) -> Self:
        kind = JobKind.of(job)
        return cls(kind.model, kind.shape, version_of(job), kind.is_urgent, kind.memory)


_KIND = TypeAdapter(KindEntry)


def version_of(job: Job) -> int:
    """The version of a job's records: the oldest that reads all of them.

    Version 2 makes opaque images of text only, and would ignore a picture to edit.
    """
    request = job.requests[0]
    is_new = isinstance(request, ImageRequest) and (request.is_transparent or request.edit is not None)
    return RECORD_VERSION if is_new else _VERSION_OF_OPAQUE_IMAGES_FROM_TEXT


def dump_kind(entry: KindEntry) -> tuple[str, bytes]:
    """The name of a kind, see `redis_scripts`, and its entry. The name says all: its entry never changes."""
    data = _KIND.dump_json(entry, exclude_defaults=True)
    return f"{sha256(data).hexdigest()[:16]}{'h' if entry.is_high else 'n'}{entry.model}", data


def model_of(name: str) -> str:
    """The model of the kind of this name."""
    return name[17:]


def load_kind(data: bytes) -> KindEntry | None:
    """None if `data` is not what `dump_kind` writes."""
    try:
        return _KIND.validate_json(data)
    except ValueError:
        return None


def dump_job(job: Job) -> bytes:
    fields = _JOB.dump_python(job, mode="json", exclude={"requests": {"__all__": {"point"}}})
    for request, entry in zip(job.requests, fields["requests"], strict=True):
        entry["point"] = point_entry(request.point)
    return json.dumps(fields).encode()


def dump_receipts(receipts: tuple[Receipt, ...]) -> bytes:
    return _RECEIPTS.dump_json(receipts)


def dump_failure(failure: Failure) -> bytes:
    return _FAILURE.dump_json(failure)


def load_snapshot(job_id: str, fields: Mapping[bytes, bytes]) -> JobSnapshot:
    """The job whose hash in Redis has these `fields`.

    Raises JobNotFound without a record, StoreUnavailable if a newer version of the server wrote it, JobUnreadable for a
    record that no version should write.
    """
    if not fields:
        raise JobNotFound(f"there is no job '{job_id}'")
    try:
        version = int(fields.get(b"version", b"1"))
        if version <= RECORD_VERSION:
            return JobSnapshot(_load_job(fields[b"job"]), _load_state(fields))
    except Exception as error:  # a record may break in any way that a reader can fail
        raise JobUnreadable(job_id) from error
    raise StoreUnavailable(f"job {job_id} was recorded by a newer version of this server; try again in a moment")


def load_pictures(job: Job, data: bytes, fields: Mapping[bytes, bytes]) -> Job:
    """The job with its pictures, which `data` has one after the other. Before version 3 there was only one.

    Raises JobUnreadable if they are not all there.
    """
    try:
        sizes: list[int] = json.loads(fields.get(b"picture_sizes", b"[%d]" % len(data)))
        if sum(sizes) != len(data) or len(sizes) != len(pictures_of(job.requests[0])):
            raise ValueError(f"its pictures have {sizes} bytes, and {len(data)} are there")
    except Exception as error:  # a record may break in any way that a reader can fail
        raise JobUnreadable(job.id) from error
    return job.with_input_images([data[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)])


def load_sums(sums: Mapping[bytes, bytes], own_us: bytes | None, num_owners: int) -> Load:
    """The load whose sums in Redis are these, in whole microseconds. `own_us` is that of one owner."""
    numbers = {field.decode(): int(number) for field, number in sums.items()}
    models = {field.partition(":")[2] for field in numbers if ":" in field}
    return Load(
        {
            model: ModelLoad(
                num_queued=numbers.get(f"queued:{model}", 0),
                num_running=numbers.get(f"running:{model}", 0),
                queued_s=numbers.get(f"queued_us:{model}", 0) / 1e6,
                running_s=numbers.get(f"running_us:{model}", 0) / 1e6,
                urgent_s=numbers.get(f"urgent_us:{model}", 0) / 1e6,
            )
            for model in models
        },
        image_bytes=numbers.get("image_bytes", 0),
        own_s=int(own_us or 0) / 1e6,
        num_owners=num_owners,
    )


def load_event(event_id: bytes, fields: Mapping[bytes, bytes]) -> Event | None:
    """None for an event that this version does not know."""
    try:
        return Event(event_id.decode(), EventName(fields[b"name"].decode()), json.loads(fields[b"data"]))
    except (KeyError, ValueError):
        return None


def _load_job(data: bytes) -> Job:
    fields = json.loads(data)
    for entry in fields["requests"]:
        entry["point"]["policy"] = point_of(entry["point"]).policy  # the rest is left for pydantic to check
    job = _JOB.validate_python(fields)
    if {request.model for request in job.requests} != {job.model}:
        raise ValueError(f"its requests are not all of its model '{job.model}', or there are none")
    return job


def _load_state(fields: Mapping[bytes, bytes]) -> JobState:

    def number(name: bytes) -> float | None:
        return float(fields[name]) if name in fields else None

    return JobState(
        status=JobStatus(fields[b"status"].decode()),
        started_at=number(b"started_at"),
        ended_at=number(b"ended_at"),
        steps_done=int(fields.get(b"steps_done", b"0")),
        num_steps=int(fields[b"num_steps"]) if b"num_steps" in fields else None,
        compute_ratio=number(b"compute_ratio"),
        attempts=int(fields.get(b"attempts", b"0")),
        receipts=_RECEIPTS.validate_json(fields[b"receipts"]) if b"receipts" in fields else (),
        failure=_FAILURE.validate_json(fields[b"failure"]) if b"failure" in fields else None,
        content=fields[b"content"].decode() if b"content" in fields else None,
    )
