"""What the API answers with. Fields that are not set are absent from the JSON."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from models.card import Guidance
from models.curve import Preset
from models.report import Decision
from service.jobs.job import JobStatus


class ErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The request's field that is wrong, such as `budget.quality`.")
    code: str


class ErrorBody(BaseModel):
    error: ErrorDetail


class BlocksBody(BaseModel):
    run: int
    skipped: int
    reused: int


class SecondsBody(BaseModel):
    queue: float
    encode: float
    denoise: float
    decode: float
    total: float


class DecisionBody(BaseModel):
    block: str
    branch: str = Field(description="The guidance branch: cond or uncond.")
    decision: Decision
    mlp_width: float


class MeshReportBody(BaseModel):
    num_vertices: int
    num_faces: int
    num_components: int = Field(description="Parts that hang together.")
    num_removed_floaters: int = Field(description="Tiny parts that were taken away.")
    is_watertight: bool


class ReceiptBody(BaseModel):
    """What was really done. Of several pictures: counts are sums, seconds the longest, the rest means."""

    rule: str
    skip_threshold: tuple[float, float] = Field(description="In the first and in the last step.")
    quality_requested: float | None = Field(description="Null for a compute_ratio budget.")
    quality_applied: float
    compute_ratio: float
    compute_ratio_predicted: float
    blocks: BlocksBody
    mean_mlp_width: float
    num_inference_steps: int
    seconds: SecondsBody
    batch_size_mean: float
    degraded: bool = Field(description="Whether load lowered the quality within min_quality.")
    deadline_met: bool | None = Field(description="Null without a deadline.")
    mesh: MeshReportBody | None = Field(default=None, description="Of a mesh only.")
    decisions: list[list[DecisionBody]] | None = Field(
        default=None, description='With "trace": for each step, every block. Not in a receipt of several pictures.'
    )


class FileBody(BaseModel):
    b64_json: str | None = Field(default=None, description="With response_format b64_json.")
    url: str | None = Field(default=None, description="With response_format url.")
    seed: int
    receipt: ReceiptBody | None = Field(default=None, description="This picture's own, when the job has several.")


class ImageResponse(BaseModel):
    created: int
    id: str = Field(description="The job's id.")
    model: str
    data: list[FileBody]
    size: str
    output_format: str
    receipt: ReceiptBody


class MeshResponse(BaseModel):
    created: int
    id: str = Field(description="The job's id.")
    model: str
    data: list[FileBody] = Field(description="One mesh.")
    octree_resolution: int
    output_format: str
    receipt: ReceiptBody


class ProgressBody(BaseModel):
    step: int = Field(description="Denoise steps done; of several pictures, the mean, rounded down.")
    num_inference_steps: int


class LinksBody(BaseModel):
    self: str
    events: str
    content: list[str] = Field(description="One for each picture, once the job has succeeded.")


class JobBody(BaseModel):
    id: str
    object: Literal["job"]
    status: JobStatus
    model: str
    created: int
    progress: ProgressBody
    receipt: ReceiptBody | None
    error: ErrorDetail | None
    links: LinksBody


EVENT_STREAM: dict[str, Any] = {
    # OpenAPI 3.2's word for what a stream is a sequence of, which FastAPI uses in documents of 3.1 as well.
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "required": ["event", "data"],
            "properties": {
                "event": {"type": "string", "description": "What `type` in the data says."},
                "data": {"type": "string", "contentMediaType": "application/json"},
                "id": {"type": "string", "description": "For `Last-Event-ID`; an error that ends a stream has none."},
            },
        }
    }
}


def header(description: str, *, required: bool = True, **schema: Any) -> dict[str, Any]:
    """A response's header, for the OpenAPI document; of `schema`, or a string."""
    return {"description": description, "required": required, "schema": schema or {"type": "string"}}


def job_links(job_id: str) -> dict[str, Any]:
    """What can be done with a job, for the OpenAPI document. `job_id` is the expression that finds it in the answer."""
    descriptions = {
        "show_job": "Its status, progress and receipt.",
        "stream_events": "Its events, from the first to the last.",
        "show_content": "Its file, once it has succeeded.",
        "cancel_job": "Stop it.",
    }
    return {
        name: {"operationId": name, "parameters": {"job_id": job_id}, "description": description}
        for name, description in descriptions.items()
    }


JOB_ID_HEADERS: dict[str, Any] = {"X-Job-ID": header("The job's id.")}
MADE: dict[str, Any] = {
    "headers": {
        **JOB_ID_HEADERS,
        "X-Seed": header("With response_format binary.", required=False, type="integer"),
        "X-Receipt": header("With response_format binary: the receipt as JSON.", required=False),
    },
    "links": job_links("$response.header.X-Job-ID"),
}
ACCEPTED: dict[str, Any] = {
    "model": JobBody,
    "description": "With `Prefer: respond-async`: the job, in `Location` where to ask for it, in `Retry-After` when.",
    "headers": {
        **JOB_ID_HEADERS,
        "Location": header("Where the job is."),
        "Retry-After": header("Seconds until it may have ended.", type="integer", minimum=1),
        "Preference-Applied": header("respond-async."),
    },
    "links": job_links("$response.header.X-Job-ID"),
}
SHOWN: dict[str, Any] = {"description": "The job.", "links": job_links("$response.body#/id")}


class SizesBody(BaseModel):
    multiple_of: int
    minimum: int
    maximum: int


class OctreeResolutionsBody(BaseModel):
    multiple_of: int
    minimum: int
    maximum: int


class DefaultsBody(BaseModel):
    size: str | None = Field(default=None, description="Of an image model.")
    octree_resolution: int | None = Field(default=None, description="Of a mesh model.")
    num_inference_steps: int
    guidance_scale: float


class LimitsBody(BaseModel):
    prompt_characters: int | None = Field(default=None, description="Of an image model.")
    num_inference_steps: int
    batch_size: int


class CurvePointBody(BaseModel):
    preset: Preset | None
    quality: float
    compute_ratio: float
    expected_seconds: float = Field(description="Denoising time of one result, alone, with the model's defaults.")
    rule: str
    policy: dict[str, float] = Field(description="The settings of the rule; each rule has its own.")


class ModelBody(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    family: str
    modality: str
    license: str
    guidance: Guidance = Field(
        description="What guidance_scale is: distilled, an input of the model; none, without effect; true, "
        "classifier-free guidance, with negative_prompt. Unless it is true, true_cfg_scale is that guidance."
    )
    sizes: SizesBody | None = Field(default=None, description="Sides in pixels, of an image model.")
    octree_resolutions: OctreeResolutionsBody | None = Field(
        default=None, description="Cells of the field's grid along a side, of a mesh model."
    )
    defaults: DefaultsBody
    limits: LimitsBody
    rules: list[str]
    quality_metric: str
    curve: list[CurvePointBody]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelBody]


class HealthBody(BaseModel):
    status: Literal["ok"]


class ReadyBody(BaseModel):
    status: Literal["ready", "unavailable"]
    reason: str | None = Field(default=None, description="Why the server is unavailable.")
