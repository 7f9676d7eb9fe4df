"""Whose job it is: each is its maker's own."""

import re

from fastapi import Request

from service.errors import JobNotFound
from service.jobs.job import Job
from service.jobs.store import JobStore
from service.keys import ApiKey, Scope

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


def owner_of(request: Request) -> str | None:
    """The id of the API key of a request; None where no keys are in use."""
    key: ApiKey | None = getattr(request.state, "key", None)
    return None if key is None else key.id


async def own_job(job_id: str, request: Request, store: JobStore) -> Job:
    """The job, if this request's key may see it: its maker's, or an operator's. Raises JobNotFound if not."""
    if not _JOB_ID.fullmatch(job_id):  # a store may know other things by other names
        raise JobNotFound(f"there is no job '{job_id}'")
    job = await store.get(job_id)
    key: ApiKey | None = getattr(request.state, "key", None)
    if key is not None and job.owner != key.id and Scope.ADMIN not in key.scopes:
        raise JobNotFound(f"there is no job '{job_id}'")
    return job
