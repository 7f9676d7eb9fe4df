"""Jobs as JSON. Policies are written by the name of their rule, since each rule has its own type of settings."""

import json

from pydantic import TypeAdapter

from models.curve import point_entry, point_of
from service.jobs.job import Job

_JOB = TypeAdapter(Job)


def dump_job(job: Job) -> bytes:
    fields = _JOB.dump_python(job, mode="json", exclude={"requests": {"__all__": {"point"}}})
    for request, entry in zip(job.requests, fields["requests"], strict=True):
        entry["point"] = point_entry(request.point)
    return json.dumps(fields).encode()


def load_job(data: bytes) -> Job:
    """Raises ValueError or WeightsError if `data` is not what `dump_job` writes."""
    fields = json.loads(data)
    for entry in fields["requests"]:
        entry["point"] = point_of(entry["point"])
    return _JOB.validate_python(fields)
