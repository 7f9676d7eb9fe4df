"""The requests' bodies, as clients write them. What a model allows is checked in `parsing`."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool
from pydantic_core import PydanticCustomError, PydanticKnownError

from models.file_formats import MeshFormat, OutputFormat
from models.request import MIN_TARGET_FACES
from service.budget import BudgetBody, Number
from service.jobs.job import Priority

MAX_SEED = 2**63 - 1

Integer = Annotated[int, Field(strict=True)]


def _check_unicode(value: str) -> str:
    """JSON can spell half of a surrogate pair, which no answer can repeat; pydantic only notices if it has to count."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticKnownError("string_unicode") from error
    return value


Text = Annotated[str, AfterValidator(_check_unicode)]


class QualityWord(StrEnum):
    """OpenAI's words for quality."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    AUTO = "auto"
    STANDARD = "standard"
    HD = "hd"


class ResponseFormat(StrEnum):
    B64_JSON = "b64_json"
    URL = "url"
    BINARY = "binary"


def _unless(accepted: tuple[object, ...], message: str) -> BeforeValidator:
    """Refuse, with `message`, any value but the `accepted` ones."""

    def check(value: object) -> object:
        if not any(value is accept or (isinstance(accept, str) and value == accept) for accept in accepted):
            raise PydanticCustomError("unsupported", "{message}", {"message": message})
        return value

    return BeforeValidator(check)


class GenerationBody(BaseModel):
    """What can be said of anything that is made."""

    model_config = ConfigDict(extra="forbid")

    num_inference_steps: Integer | None = Field(
        default=None, ge=1, description="Denoise steps; the model has a default."
    )
    seed: Integer | None = Field(default=None, ge=0, le=MAX_SEED, description="Random if absent; always returned.")
    budget: BudgetBody | None = Field(default=None, description="Speed against quality; the server has a default.")
    priority: Priority | None = Field(default=None, description="Place in the queue; normal by default.")
    trace: StrictBool = Field(default=False, description="Whether the receipt lists every decision of every block.")
    stream: StrictBool | None = Field(
        default=None, description="Whether to answer with server-sent events, the last of which has the result."
    )
    partial_images: Integer | None = Field(
        default=None,
        ge=0,
        le=3,
        description="How many previews of the unfinished result the events have; with stream or Prefer: respond-async.",
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="b64_json by default; binary only for one result."
    )
    webhook_url: str | None = Field(
        default=None,
        max_length=2000,
        description="Where to tell that the job has ended, on a host that the server allows, signed as Standard "
        "Webhooks says.",
    )


class ImageBody(GenerationBody):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "a red circle above a blue square", "budget": {"quality": 0.9}}]},
    )

    model: Text | None = Field(
        default=None, description="An id from /v1/models; the server's first image model by default."
    )
    prompt: str = Field(min_length=1, description="What the picture shows. The model limits its characters.")
    negative_prompt: Text | None = Field(
        default=None,
        description="What it should not show; only with true classifier-free guidance. Where the model's `guidance` in "
        "/v1/models is true, that is a `guidance_scale` above 1, and this is empty by default; elsewhere it is a "
        "`true_cfg_scale` above 1, which needs this.",
    )
    true_cfg_scale: Number | None = Field(
        default=None,
        ge=1,
        le=100,
        description="True classifier-free guidance besides `guidance_scale`; 1 is off. Not for models whose `guidance` "
        "in /v1/models is true.",
    )
    n: Integer | None = Field(
        default=None, ge=1, le=8, description="How many pictures, with seeds seed, seed + 1, …; default 1."
    )
    size: Text | None = Field(
        default=None,
        json_schema_extra={"pattern": "^([0-9]{1,5}x[0-9]{1,5}|auto)$"},
        description='"WIDTHxHEIGHT" in pixels, or "auto" for the model\'s default. Or use `width` and `height`.',
    )
    width: Integer | None = Field(default=None, description="In pixels, together with `height`.")
    height: Integer | None = Field(default=None, description="In pixels, together with `width`.")
    guidance_scale: Number | None = Field(
        default=None,
        ge=0,
        le=100,
        description="The model has a default, and its `guidance` in /v1/models says what this is: distilled, an input "
        "of the model; none, without effect; true, classifier-free guidance: off up to 1, above it twice the compute.",
    )
    quality: QualityWord | None = Field(
        default=None,
        description="OpenAI's word instead of a budget: low is draft, medium fast, high high, hd exact; auto and "
        "standard are the server's default.",
    )
    output_format: OutputFormat | None = Field(default=None, description="png by default.")
    output_compression: Integer | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Quality of webp and jpeg files: 100 is the largest and best, default 95.",
    )
    metadata: StrictBool = Field(
        default=True,
        description="Whether PNG and WebP files carry prompt, seed, model and budget. JPEG files never do.",
    )
    user: Text | None = Field(default=None, description="OpenAI's field; ignored.")
    safety_identifier: Text | None = Field(default=None, description="OpenAI's field; ignored.")
    background: Annotated[
        Literal["auto", "opaque"] | None,
        _unless(("auto", "opaque", None), "pictures are always opaque; omit background, or use 'opaque' or 'auto'"),
    ] = Field(default=None, description="OpenAI's field; pictures are always opaque.")
    moderation: Annotated[
        Literal["auto", "low"] | None,
        _unless(("auto", "low", None), "moderation can be 'auto' or 'low'; this server does not filter at all"),
    ] = Field(default=None, description="OpenAI's field; this server does not filter prompts or pictures.")
    style: Annotated[
        None, _unless((None,), "this server has no styles; omit style and describe the style in the prompt")
    ] = Field(default=None, description="OpenAI's field; describe the style in the prompt instead.")


class MeshBody(GenerationBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"input_image": "data:image/png;base64,iVBORw0KGgo…", "budget": {"quality": 0.9}}]
        },
    )

    model: Text | None = Field(
        default=None, description="An id from /v1/models; the server's first mesh model by default."
    )
    input_image: str = Field(
        min_length=1, description="The picture of one object, as base64 or as a `data:` URL: PNG, JPEG or WebP."
    )
    remove_background: Annotated[
        Literal["auto"] | bool | None,
        _unless(("auto", True, False, None), "remove_background can be 'auto', true or false"),
    ] = Field(
        default=None,
        description="Whether the object is cut out of a plain background; auto, the default, does it where the picture "
        "has no transparency.",
    )
    guidance_scale: Number | None = Field(
        default=None,
        ge=0,
        le=100,
        description="The model has a default. Where its `guidance` in /v1/models is true, 1 is off, and any other "
        "scale twice the compute.",
    )
    octree_resolution: Integer | None = Field(
        default=None, description="Cells of the field's grid along a side; the model has a default and limits."
    )
    target_faces: Integer | None = Field(
        default=None,
        ge=MIN_TARGET_FACES,
        description="How many triangles the mesh may have; null reduces nothing.",
    )
    output_format: MeshFormat | None = Field(default=None, description="glb by default.")
