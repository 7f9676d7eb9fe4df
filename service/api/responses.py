"""The bodies of answers, and what the OpenAPI document says about answers. Unset fields are left out of the JSON."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from models.card import Edits, Guidance
from models.curve import Preset
from models.report import Decision
from service.jobs.job import JobStatus
from service.order import QualityLevel
from service.running.model_changes import ModelStatus


class ErrorDetail(BaseModel):
    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None = Field(description="The wrong field of the request, such as `budget.quality`.")
    code: str


class ErrorBody(BaseModel):
    error: ErrorDetail


class StepsBody(BaseModel):
    computed: int = Field(description="Steps that ran the transformer.")
    forecast: int = Field(description="Steps that were extrapolated from computed ones instead.")


class BlocksBody(BaseModel):
    run: int
    skipped: int
    reused: int
    forecast: int = Field(description="The blocks of steps that were forecast.")


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
    mlp_width: float = Field(description="0 in a step that was forecast.")


class MeshReportBody(BaseModel):
    num_vertices: int
    num_faces: int
    num_components: int = Field(description="Connected parts.")
    num_removed_floaters: int = Field(description="Tiny parts that were removed.")
    is_watertight: bool


class ReceiptBody(BaseModel):
    """What the result got. For several images, counts are sums, seconds are maxima, and all other numbers are means."""

    rule: str
    skip_threshold: tuple[float, float] = Field(description="Of the first and of the last computed step.")
    quality_requested: float | None = Field(description="Null for compute_ratio and latency_ms budgets.")
    quality_applied: float
    exact: bool | str = Field(
        description="True: the latents are those of the unmodified pipeline for this seed, bit for bit. `within 0.01`: "
        "none of their numbers is farther from that pipeline's, because this server computes with compiled blocks or "
        "float8 weights. False: another budget than exact, or a deadline.",
        examples=[True],
    )
    compute_ratio: float
    compute_ratio_predicted: float
    steps: StepsBody
    calibrated: bool = Field(
        description="Whether the model's curve was measured for requests like this one: its size, guidance, number of "
        "steps and pictures. If not, one more step is computed than the curve says, and the quality is an estimate."
    )
    blocks: BlocksBody
    mean_mlp_width: float
    num_inference_steps: int
    seconds: SecondsBody
    batch_size_mean: float = Field(description="Over the computed steps.")
    degraded: bool = Field(description="Whether the quality was lowered under load, down to min_quality at most.")
    deadline_met: bool | None = Field(description="Null without a deadline.")
    mesh: MeshReportBody | None = Field(default=None, description="Only for a mesh.")
    decisions: list[list[DecisionBody]] | None = Field(
        default=None,
        description='With "trace": the decisions of all blocks, step by step. Not in a receipt of several images.',
    )


class InputTokensBody(BaseModel):
    image_tokens: int = Field(description="Of the pictures that are edited, as the model reads them.")
    text_tokens: int = Field(description="Of the prompt, and of the negative prompt if there is one.")


class UsageBody(BaseModel):
    """Tokens. The prompt counts once for each image of a call."""

    input_tokens: int
    input_tokens_details: InputTokensBody
    output_tokens: int = Field(description="Of the images: the tokens of their latents.")
    total_tokens: int


class FileBody(BaseModel):
    b64_json: str | None = Field(default=None, description="With response_format b64_json.")
    url: str | None = Field(default=None, description="With response_format url.")
    seed: int
    receipt: ReceiptBody | None = Field(default=None, description="The receipt of this image, if the job has several.")


class ImageResponse(BaseModel):
    created: int
    id: str = Field(description="The job's id.")
    model: str
    data: list[FileBody]
    size: str
    output_format: str
    quality: QualityLevel | Literal["auto"] = Field(
        description="The budget in OpenAI's words; auto if it is a latency. The receipt has the numbers."
    )
    background: Literal["opaque", "transparent"]
    usage: UsageBody
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
    step: int = Field(description="Computed steps done; for several images the mean, rounded down.")
    num_computed_steps: int = Field(
        description="Steps that are computed in all, as things stand; a deadline may change it. Others are forecast."
    )
    num_inference_steps: int


class QueueBody(BaseModel):
    position: int = Field(ge=0, description="How many queued jobs of the same model come first.")
    eta_s: float | None = Field(
        ge=0, description="Predicted seconds until the job ends; null while no worker has its model."
    )


class LinksBody(BaseModel):
    """With API keys and `link_secret`, `events` and `content` are signed: they open without a key for a while."""

    self: str
    events: str
    content: list[str] = Field(description="One URL for each artifact, once the job has succeeded.")


class JobBody(BaseModel):
    id: str
    object: Literal["job"]
    status: JobStatus
    model: str
    created: int
    queue: QueueBody | None = Field(description="Null unless the job is queued.")
    progress: ProgressBody
    receipt: ReceiptBody | None
    error: ErrorDetail | None
    links: LinksBody


class JobList(BaseModel):
    object: Literal["list"]
    data: list[JobBody] = Field(description="The newest first. Their receipts have no `decisions`.")
    first_id: str | None = Field(description="Null if there are no jobs.")
    last_id: str | None = Field(description="The value of `after` for the next page.")
    has_more: bool


EVENT_STREAM: dict[str, Any] = {
    # OpenAPI 3.2's keyword for the items of a stream, which FastAPI also uses in documents of version 3.1.
    "text/event-stream": {
        "itemSchema": {
            "type": "object",
            "required": ["event", "data"],
            "properties": {
                "event": {"type": "string", "description": "Equal to `type` in the data."},
                "data": {"type": "string", "contentMediaType": "application/json"},
                "id": {
                    "type": "string",
                    "description": "A value for `Last-Event-ID`. An error that ends a stream has none, nor has a "
                    "`job.queued` that tells a new `position`.",
                },
            },
        }
    }
}


def header(description: str, *, required: bool = True, **schema: Any) -> dict[str, Any]:
    """A response header in the OpenAPI document, with this schema; a string by default."""
    return {"description": description, "required": required, "schema": schema or {"type": "string"}}


def job_links(job_id: str) -> dict[str, Any]:
    """Links to the operations on a job in the OpenAPI document. `job_id` is the expression for its id in the answer."""
    descriptions = {
        "show_job": "Its status, progress and receipt.",
        "stream_events": "Its events, from the first to the last.",
        "show_content": "Its artifacts, once it has succeeded.",
        "cancel_job": "Stop it.",
    }
    return {
        name: {"operationId": name, "parameters": {"job_id": job_id}, "description": description}
        for name, description in descriptions.items()
    }


JOB_ID_HEADERS: dict[str, Any] = {"X-Job-ID": header("The job's id.")}
RESULT: dict[str, Any] = {
    "headers": {
        **JOB_ID_HEADERS,
        "X-Seed": header("With response_format binary.", required=False, type="integer"),
        "X-Receipt": header("With response_format binary: the receipt as JSON.", required=False),
    },
    "links": job_links("$response.header.X-Job-ID"),
}
ACCEPTED: dict[str, Any] = {
    "model": JobBody,
    "description": "With `Prefer: respond-async`: the job. Ask for it at `Location`, after `Retry-After` seconds.",
    "headers": {
        **JOB_ID_HEADERS,
        "Location": header("The URL of the job."),
        "Retry-After": header("Predicted seconds until the job ends.", type="integer", minimum=1),
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
    size: str | None = Field(default=None, description="Only for image models.")
    octree_resolution: int | None = Field(default=None, description="Only for mesh models.")
    num_inference_steps: int
    guidance_scale: float
    strength: float | None = Field(default=None, description="Only for models whose `edits` is noised.")
    masked_strength: float | None = Field(
        default=None, description="The strength of an edit with a mask; only for models whose `edits` is noised."
    )


class LimitsBody(BaseModel):
    prompt_characters: int | None = Field(default=None, description="Only for image models.")
    num_inference_steps: int
    batch_size: int


class MemoryBody(BaseModel):
    """Bytes of the device, as predicted for requests with the model's defaults."""

    weights: int = Field(description="What the model's weights take.")
    limit: int | None = Field(description="What the server may use for all weights and requests; null without a limit.")
    room: int | None = Field(description="What is left of it for the requests of all models; null without a limit.")
    exact_request: int = Field(description="The most that an exact request takes if it runs alone.")
    default_request: int = Field(description="As exact_request, at the server's default budget.")
    requests_at_once: int | None = Field(
        description="How many requests at the default budget fit into memory at once, if there are no others. The "
        "setting max_running may allow fewer. Null without a limit."
    )
    largest_size: str | None = Field(
        default=None,
        description="The largest image of the default's ratio, at the default budget; only for image models. Null if "
        "none fits.",
    )


class ComputedStepsBody(BaseModel):
    computed: int
    of: int


class CurvePointBody(BaseModel):
    preset: Preset | None
    quality: float = Field(description="The similarity to the exact result that nine of ten samples reach.")
    mean_quality: float
    steps: ComputedStepsBody | None = Field(description="How many steps are computed; null if all of them are.")
    compute_ratio: float
    expected_seconds: float = Field(
        description="Time of one request alone, with the model's defaults: denoising, and a mesh's decoding."
    )
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
        description="The meaning of guidance_scale. distilled: an input of the model. none: no effect. true: true "
        "classifier-free guidance, with negative_prompt. If it is not true, true_cfg_scale sets that guidance."
    )
    sizes: SizesBody | None = Field(default=None, description="Sides in pixels; only for image models.")
    edits: Edits | None = Field(
        default=None,
        description="Only for image models: how they edit pictures. noised: from the picture with noise on, with "
        "strength and mask. reference: they read the pictures beside the noise.",
    )
    max_input_images: int | None = Field(
        default=None, description="Only for image models: how many pictures they edit at once."
    )
    needs_input_image: bool | None = Field(
        default=None, description="Only for image models: whether every request needs a picture to edit."
    )
    backgrounds: list[Literal["opaque", "transparent"]] | None = Field(
        default=None, description="What `background` can be; only for image models."
    )
    octree_resolutions: OctreeResolutionsBody | None = Field(
        default=None, description="Cells along a side of the grid; only for mesh models."
    )
    defaults: DefaultsBody
    limits: LimitsBody
    memory: MemoryBody
    rules: list[str]
    quality_metric: str
    curve: list[CurvePointBody]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelBody]


class HealthBody(BaseModel):
    status: Literal["ok"]


class ReadyModel(BaseModel):
    workers: int = Field(description="How many workers take its jobs.")
    queued: int = Field(description="How many of its jobs are queued.")


class ReadyBody(BaseModel):
    status: Literal["ready", "unavailable"]
    reason: str | None = Field(default=None, description="Why the server is unavailable.")
    models: dict[str, ReadyModel] = Field(
        default_factory=dict,
        description="By id, the models that workers serve or have served, those of the setting `models` of an API "
        "node, and those that jobs wait for.",
    )


class AdminModelBody(BaseModel):
    id: str
    object: Literal["model"]
    status: ModelStatus


class AdminModelList(BaseModel):
    object: Literal["list"]
    data: list[AdminModelBody]
