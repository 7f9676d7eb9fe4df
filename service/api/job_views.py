"""From jobs and their artifacts to the bodies that clients get."""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace

from fastapi import Response

from service.api.errors import error_of, status_and_error
from service.api.links import Links
from service.api.products import product_of
from service.api.queue_places import queue_fields
from service.api.responses import (
    FileBody,
    ImageResponse,
    JobBody,
    JobList,
    LinksBody,
    MeshResponse,
    ProgressBody,
    QueueBody,
)
from service.api.schemas import ResponseFormat
from service.api.views import job_receipt_body, receipt_body, usage_body
from service.jobs.job import FinishedJob, JobSnapshot, JobStatus
from service.scheduling.waiting import QueuePlace


def job_body(snapshot: JobSnapshot, links: Links, place: QueuePlace | None = None) -> JobBody:
    """The job, with its place if it is queued."""
    job, state = snapshot.job, snapshot.state
    num_computed_steps = snapshot.num_steps // len(job.requests)
    is_done = state.status is JobStatus.SUCCEEDED
    return JobBody(
        id=job.id,
        object="job",
        status=state.status,
        model=job.model,
        created=int(job.created_at),
        queue=None if place is None else QueueBody(**queue_fields(place)),
        progress=ProgressBody(
            # The last progress may have been lost while the store was away.
            step=num_computed_steps if is_done else state.steps_done // len(job.requests),
            num_computed_steps=num_computed_steps,
            num_inference_steps=job.requests[0].num_inference_steps,
        ),
        receipt=job_receipt_body(state.receipts) if state.receipts else None,
        error=status_and_error(error_of(state.failure))[1] if state.failure else None,
        links=LinksBody(
            self=links.to_job(job),
            events=links.to_events(job),
            content=links.to_artifacts(job) if is_done else [],
        ),
    )


def job_list(
    snapshots: Sequence[JobSnapshot], places: Sequence[QueuePlace | None], links: Links, *, has_more: bool
) -> JobList:
    """A page of jobs, each with its place if it is queued. Their receipts have no decisions, which may be megabytes."""
    ids = [snapshot.job.id for snapshot in snapshots]
    return JobList(
        object="list",
        data=[
            job_body(_without_decisions(snapshot), links, place)
            for snapshot, place in zip(snapshots, places, strict=True)
        ],
        first_id=ids[0] if ids else None,
        last_id=ids[-1] if ids else None,
        has_more=has_more,
    )


def _without_decisions(snapshot: JobSnapshot) -> JobSnapshot:
    receipts = tuple(receipt.without_decisions() for receipt in snapshot.state.receipts)
    return replace(snapshot, state=replace(snapshot.state, receipts=receipts))


def result_body(
    finished: FinishedJob, response_format: ResponseFormat | None, links: Links
) -> ImageResponse | MeshResponse:
    """The whole result of a job that has succeeded."""
    job = finished.job
    product = product_of(job.requests[0])
    fields = {
        "created": int(job.created_at),
        "id": job.id,
        "model": job.model,
        "data": _file_bodies(finished, response_format, links),
        "output_format": job.output.format,
        "receipt": job_receipt_body(finished.state.receipts),
        **product.own_fields(job),
    }
    if product.has_usage:
        fields["usage"] = usage_body(finished.state.receipts)
    return product.response.model_validate(fields)


def binary_response(finished: FinishedJob) -> Response:
    """The only artifact of a job as a file, with the rest of the result in headers."""
    job = finished.job
    receipt = receipt_body(finished.state.receipts[0])
    headers = {
        "X-Job-ID": job.id,
        "X-Seed": str(job.requests[0].seed),
        "X-Receipt": json.dumps(receipt.model_dump(mode="json", exclude_unset=True, exclude={"decisions"})),
    }
    return Response(finished.artifacts[0], media_type=job.output.format.content_type, headers=headers)


def _file_bodies(finished: FinishedJob, response_format: ResponseFormat | None, links: Links) -> list[FileBody]:
    """The artifacts or their URLs. If there are several, each has a receipt of its own."""
    job, data = finished.job, []
    urls = links.to_artifacts(job)
    for index, request in enumerate(job.requests):
        if response_format is ResponseFormat.URL:
            file = FileBody(url=urls[index], seed=request.seed)
        else:
            file = FileBody(b64_json=base64.b64encode(finished.artifacts[index]).decode("ascii"), seed=request.seed)
        if len(job.requests) > 1:
            file.receipt = receipt_body(finished.state.receipts[index])
        data.append(file)
    return data
