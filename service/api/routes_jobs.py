"""Jobs: their status, their events, their artifacts, and cancelling them."""

import re
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Response

from models.errors import InvalidRequest
from service.api.access import Access, AccessByLink
from service.api.caller import Caller
from service.api.dependencies import ApiKeysOfApp, CallerOfRequest, DispatcherOfApp, LinksOfRequest
from service.api.errors import error_responses
from service.api.events import event_stream
from service.api.job_views import job_body, job_list
from service.api.products import PRODUCTS
from service.api.queue_places import queue_place, queue_places
from service.api.responses import EVENT_STREAM, JOB_ID_HEADERS, SHOWN, JobBody, JobList, header
from service.api.validation import shown
from service.errors import InsufficientScope, InvalidLink, JobNotFound
from service.jobs.job import JobSnapshot
from service.jobs.store import BEGINNING, END_ALONE, JobStore
from service.keys import ApiKeys, Scope

router = APIRouter(
    prefix="/v1/jobs",
    tags=["jobs"],
    responses=error_responses(401, 403),
)
_BY_KEY = [Depends(Access(Scope.GENERATE))]
_BY_LINK = [Depends(AccessByLink(Scope.GENERATE))]  # or by key

# Other names may exist in the store; no job has one of them.
_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_EVENT_ID = re.compile(r"[0-9]{1,18}-[0-9]{1,18}", re.ASCII)
_LAST_EVENT_ID = Header(
    description="The id of the last event that arrived.", json_schema_extra={"pattern": f"^{_EVENT_ID.pattern}$"}
)
_AFTER = Query(
    description="The id of a job: the page begins after it.", json_schema_extra={"pattern": f"^{_JOB_ID.pattern}$"}
)
_ALL = Query(alias="all", description="Whether to list the jobs of all keys; needs the scope admin.")


@router.get(
    "",
    summary="The jobs that this key created, the newest first",
    operation_id="list_jobs",
    dependencies=_BY_KEY,
    response_model_exclude_unset=True,
    responses=error_responses(404, 422, 503),
)
async def list_jobs(
    caller: CallerOfRequest,
    dispatcher: DispatcherOfApp,
    links: LinksOfRequest,
    limit: Annotated[int, Query(ge=1, le=100, description="The most jobs in this page.")] = 20,
    after: Annotated[str | None, _AFTER] = None,
    all_keys: Annotated[bool, _ALL] = False,
) -> JobList:
    """Jobs that ended more than `job_ttl_s` ago are gone. Without keys in the settings, all jobs are listed."""
    if all_keys and caller.key is not None and not caller.key.allows(Scope.ADMIN):
        raise InsufficientScope("the jobs of all keys need a key with the scope admin")
    store = dispatcher.store
    if after is not None:
        await _own_job(after, caller, store)
    owner = None if all_keys else caller.owner
    found = await store.jobs(owner, limit=limit + 1, before=after)
    page = found[:limit]
    return job_list(page, await queue_places(page, store, dispatcher.fleet), links, has_more=len(found) > limit)


@router.get(
    "/{job_id}",
    summary="A job's status, progress and receipt",
    operation_id="show_job",
    dependencies=_BY_KEY,
    response_model_exclude_unset=True,
    responses={200: SHOWN, **error_responses(404, 503)},
)
async def show_job(job_id: str, caller: CallerOfRequest, dispatcher: DispatcherOfApp, links: LinksOfRequest) -> JobBody:
    snapshot = await _own_job(job_id, caller, dispatcher.store)
    return job_body(snapshot, links, await queue_place(snapshot, dispatcher.store, dispatcher.fleet))


@router.get(
    "/{job_id}/events",
    summary="A job's events until it has ended, from the first or after `Last-Event-ID`",
    operation_id="stream_events",
    dependencies=_BY_LINK,
    response_class=Response,
    responses={
        200: {
            "description": "Server-sent events; the last one has the result or an error.",
            "headers": JOB_ID_HEADERS,
            "content": EVENT_STREAM,
        },
        204: {"description": "Nothing follows `Last-Event-ID`, and the job has ended: do not connect again."},
        **error_responses(404, 422, 503),
    },
)
async def stream_events(
    job_id: str,
    caller: CallerOfRequest,
    api_keys: ApiKeysOfApp,
    dispatcher: DispatcherOfApp,
    links: LinksOfRequest,
    last_event_id: Annotated[str | None, _LAST_EVENT_ID] = None,
) -> Response:
    """Every server that shares the job's store can stream them."""
    if last_event_id is not None and not _EVENT_ID.fullmatch(last_event_id):
        raise InvalidRequest("Last-Event-ID is not the id of an event, such as 1-0", "Last-Event-ID")
    snapshot = await _open_job(job_id, caller, api_keys, dispatcher.store)
    after = await _place_of(last_event_id or BEGINNING, snapshot, dispatcher.store)
    if after is None:
        return Response(status_code=204, media_type="text/event-stream")
    return event_stream(snapshot.job, dispatcher, links, after=after)


@router.get(
    "/{job_id}/content",
    summary="An artifact: the file of an image or a mesh",
    operation_id="show_content",
    dependencies=_BY_LINK,
    response_class=Response,
    responses={
        200: {
            "description": "The file, in the output_format of the job.",
            "headers": {"Content-Disposition": header("A name for the file.")},
            "content": {
                file_format.content_type: {"schema": {"type": "string", "format": "binary"}}
                for product in PRODUCTS
                for file_format in product.formats
            },
        },
        **error_responses(404, 409, 410, 422, 503),
    },
)
async def show_content(
    job_id: str,
    caller: CallerOfRequest,
    api_keys: ApiKeysOfApp,
    dispatcher: DispatcherOfApp,
    index: Annotated[int, Query(ge=0, description="Which image of a job with n > 1, from 0.")] = 0,
) -> Response:
    await _open_job(job_id, caller, api_keys, dispatcher.store)
    finished = await dispatcher.store.content(job_id)
    last = len(finished.artifacts) - 1
    if index > last:
        raise InvalidRequest(f"index {shown(index)} is above the last artifact of job {job_id}; try {last}", "index")
    output_format = finished.job.output.format
    name = f"{job_id}-{index}.{output_format}"
    return Response(
        finished.artifacts[index],
        media_type=output_format.content_type,
        headers={"Content-Disposition": f'inline; filename="{name}"'},
    )


@router.delete(
    "/{job_id}",
    summary="Cancel a job",
    operation_id="cancel_job",
    dependencies=_BY_KEY,
    response_model_exclude_unset=True,
    responses={200: SHOWN, **error_responses(404, 503)},
)
async def cancel_job(
    job_id: str, caller: CallerOfRequest, dispatcher: DispatcherOfApp, links: LinksOfRequest
) -> JobBody:
    """A queued job never runs. A running job stops before its next denoise step. An ended job stays as it is."""
    await _own_job(job_id, caller, dispatcher.store)
    return job_body(await dispatcher.cancel(job_id), links)


async def _place_of(event_id: str, snapshot: JobSnapshot, store: JobStore) -> str | None:
    """Where a stream goes on for a client that has this event; None if nothing can follow.

    The events of an ended job may have been deleted, perhaps before the client has had the last one. Then it gets the
    end, as a client does that begins. Raises InvalidRequest for an event that is yet to come.
    """
    job_id = snapshot.job.id
    if await store.events(job_id, event_id):
        return event_id
    events = await store.events(job_id, BEGINNING)
    if events and _order_of(event_id) > _order_of(events[-1].id):
        last = events[-1].id
        raise InvalidRequest(f"Last-Event-ID {event_id} is after the job's last event, {last}", "Last-Event-ID")
    if not snapshot.state.status.is_terminal:
        return event_id
    return None if events or event_id == END_ALONE else BEGINNING


def _order_of(event_id: str) -> list[int]:
    return [int(part) for part in event_id.split("-")]


async def _open_job(job_id: str, caller: Caller, api_keys: ApiKeys, store: JobStore) -> JobSnapshot:
    """The job, for its signed link too. Raises InvalidLink once the key that created the job has been removed."""
    if not caller.has_link:
        return await _own_job(job_id, caller, store)
    snapshot = await _job(job_id, store)
    if snapshot.job.owner is not None and not api_keys.has(snapshot.job.owner):
        raise InvalidLink("the API key that this link belongs to has been removed")
    return snapshot


async def _own_job(job_id: str, caller: Caller, store: JobStore) -> JobSnapshot:
    """The job, if the caller's key created it or has the scope `admin`. Raises JobNotFound otherwise."""
    snapshot = await _job(job_id, store)
    if caller.key is not None and snapshot.job.owner != caller.key.id and Scope.ADMIN not in caller.key.scopes:
        raise JobNotFound(f"there is no job '{job_id}'")
    return snapshot


async def _job(job_id: str, store: JobStore) -> JobSnapshot:
    if not _JOB_ID.fullmatch(job_id):
        raise JobNotFound(f"there is no job {shown(job_id)}")
    return await store.get(job_id)
