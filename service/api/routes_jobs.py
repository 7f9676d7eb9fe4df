"""Jobs and their files."""

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from models.artifact import MeshFormat, OutputFormat
from models.errors import InvalidRequest
from service.api.dependencies import SettingsOfApp, WorkerOfApp
from service.api.errors import error_of, error_responses, status_and_error
from service.api.responses import JobBody, LinksBody, ProgressBody
from service.api.views import job_receipt_body
from service.jobs.job import Job, JobStatus
from service.settings import Settings

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])


@router.get(
    "/{job_id}",
    summary="A job's status, progress and receipt",
    response_model_exclude_unset=True,
    responses=error_responses(404),
)
async def show_job(job_id: str, request: Request, worker: WorkerOfApp, settings: SettingsOfApp) -> JobBody:
    job = worker.store.get(job_id)
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
            self=f"{_base_url(request, settings)}/v1/jobs/{job.id}",
            content=content_urls(job, request, settings) if is_done else [],
        ),
    )


@router.get(
    "/{job_id}/content",
    summary="A picture's file",
    response_class=Response,
    responses={
        200: {
            "description": "The file, as the job's output_format says.",
            "content": {
                file_format.content_type: {"schema": {"type": "string", "format": "binary"}}
                for file_format in (*OutputFormat, *MeshFormat)
            },
        },
        **error_responses(404, 409, 410, 422),
    },
)
async def show_content(
    job_id: str, worker: WorkerOfApp, index: Annotated[int, Query(ge=0, description="Which picture, if n > 1.")] = 0
) -> Response:
    outcome = worker.store.content(job_id)
    if index >= len(outcome.pictures):
        raise InvalidRequest(
            f"index {index} is above the last picture of job {job_id}; try {len(outcome.pictures) - 1}", "index"
        )
    output_format = outcome.job.output.format
    name = f"{job_id}-{index}.{output_format}"
    return Response(
        outcome.pictures[index],
        media_type=output_format.content_type,
        headers={"Content-Disposition": f'inline; filename="{name}"'},
    )


def content_urls(job: Job, request: Request, settings: Settings) -> list[str]:
    """Where a job's pictures can be fetched."""
    base = _base_url(request, settings)
    return [f"{base}/v1/jobs/{job.id}/content?index={index}" for index in range(len(job.requests))]


def _base_url(request: Request, settings: Settings) -> str:
    return (settings.public_url or str(request.base_url)).rstrip("/")
