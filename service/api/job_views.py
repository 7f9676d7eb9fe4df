"""From jobs and their outcomes to what clients are answered."""

import base64
import json
from urllib.parse import quote

from fastapi import Request, Response

from models.request import ImageRequest, MeshRequest
from service.api.errors import error_of, status_and_error
from service.api.responses import FileBody, ImageResponse, JobBody, LinksBody, MeshResponse, ProgressBody
from service.api.schemas import ResponseFormat
from service.api.views import job_receipt_body, receipt_body
from service.jobs.job import Job, JobStatus, Outcome
from service.settings import Settings


def base_url(request: Request, settings: Settings) -> str:
    """What links begin with."""
    return (settings.public_url or str(request.base_url)).rstrip("/")


def content_urls(job: Job, base: str) -> list[str]:
    """Where a job's pictures can be fetched."""
    return [f"{base}/v1/jobs/{quote(job.id)}/content?index={index}" for index in range(len(job.requests))]


def job_body(job: Job, base: str) -> JobBody:
    num_inference_steps = job.requests[0].num_inference_steps
    # Steps of no length, with which some schedules end, are counted when all is done.
    is_done = job.status is JobStatus.SUCCEEDED
    return JobBody(
        id=job.id,
        object="job",
        status=job.status,
        model=job.model,
        created=int(job.created_at),
        progress=ProgressBody(
            step=num_inference_steps if is_done else job.steps_done // len(job.requests),
            num_inference_steps=num_inference_steps,
        ),
        receipt=job_receipt_body(job.receipts) if job.receipts else None,
        error=status_and_error(error_of(job.failure))[1] if job.failure else None,
        links=LinksBody(
            self=f"{base}/v1/jobs/{quote(job.id)}",
            events=f"{base}/v1/jobs/{quote(job.id)}/events",
            content=content_urls(job, base) if is_done else [],
        ),
    )


def result_body(outcome: Outcome, response_format: ResponseFormat | None, base: str) -> ImageResponse | MeshResponse:
    """The whole result of a job that has succeeded."""
    job = outcome.job
    shared = {
        "created": int(job.created_at),
        "id": job.id,
        "model": job.model,
        "data": _file_bodies(outcome, response_format, base),
        "output_format": job.output.format,
        "receipt": job_receipt_body(job.receipts),
    }
    match job.requests[0]:
        case ImageRequest(width=width, height=height):
            return ImageResponse.model_validate({**shared, "size": f"{width}x{height}"})
        case MeshRequest(octree_resolution=octree_resolution):
            return MeshResponse.model_validate({**shared, "octree_resolution": octree_resolution})


def binary_response(outcome: Outcome) -> Response:
    job = outcome.job
    receipt = receipt_body(job.receipts[0])
    headers = {
        "X-Job-ID": job.id,
        "X-Seed": str(job.requests[0].seed),
        "X-Receipt": json.dumps(receipt.model_dump(mode="json", exclude_unset=True, exclude={"decisions"})),
    }
    return Response(outcome.pictures[0], media_type=job.output.format.content_type, headers=headers)


def _file_bodies(outcome: Outcome, response_format: ResponseFormat | None, base: str) -> list[FileBody]:
    """The job's files, or where to fetch them. Of several each has its own receipt."""
    job, data = outcome.job, []
    urls = content_urls(job, base)
    for index, made in enumerate(job.requests):
        if response_format is ResponseFormat.URL:
            file = FileBody(url=urls[index], seed=made.seed)
        else:
            file = FileBody(b64_json=base64.b64encode(outcome.pictures[index]).decode("ascii"), seed=made.seed)
        if len(job.requests) > 1:
            file.receipt = receipt_body(job.receipts[index])
        data.append(file)
    return data
