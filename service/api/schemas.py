"""The bodies of requests, as clients write them. `parsing` checks the limits of the model."""

import re
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StrictBool
from pydantic_core import PydanticCustomError, PydanticKnownError

from models.file_formats import MeshFormat, OutputFormat
from models.request import MIN_TARGET_FACES
from service.budget import BudgetBody, ClosedBody, Number
from service.jobs.job import Priority

MAX_SEED = 2**63 - 1

Integer = Annotated[int, Field(strict=True)]


def _check_unicode(value: str) -> str:
    """Refuse half surrogate pairs, which JSON can spell but no answer can repeat. pydantic only finds them if it counts
    characters.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise PydanticKnownError("string_unicode") from error
    return value


Text = Annotated[str, AfterValidator(_check_unicode)]


def _check_url_characters(value: str) -> str:
    """Refuse what no URL has. Parsers drop line breaks and tabs without a word, so that the URL called is another."""
    if not re.fullmatch(r"[!-~]*", value):
        message = "webhook_url has a space, a control character or one beyond ASCII; percent-encode it"
        raise PydanticCustomError("unsupported", "{message}", {"message": message})
    return value


UrlText = Annotated[str, AfterValidator(_check_url_characters)]


class QualityWord(StrEnum):
    """OpenAI's levels of quality."""

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
    """Refuse all values but `accepted`, with `message`."""

    def check(value: object) -> object:
        if not any(value is accept or (isinstance(accept, str) and value == accept) for accept in accepted):
            raise PydanticCustomError("unsupported", "{message}", {"message": message})
        return value

    return BeforeValidator(check)


class GenerationBody(ClosedBody):
    """The fields that image and mesh requests share."""

    num_inference_steps: Integer | None = Field(
        default=None,
        ge=1,
        description="Denoise steps; the model has a default. The budget decides how many of them are computed; the "
        "others are forecast.",
    )
    seed: Integer | None = Field(default=None, ge=0, le=MAX_SEED, description="Random if absent; always returned.")
    budget: BudgetBody | None = Field(default=None, description="Trades speed for quality; the server has a default.")
    priority: Priority | None = Field(
        default=None, description="Place in the queue and share of the device; normal by default."
    )
    trace: StrictBool = Field(
        default=False,
        description="Whether the receipt lists every decision of every block. The server's settings bound its length.",
    )
    stream: StrictBool | None = Field(
        default=None, description="Whether to answer with server-sent events; the last one has the result."
    )
    partial_images: Integer | None = Field(
        default=None,
        ge=0,
        le=3,
        description="How many previews of the unfinished result the events have; needs stream or respond-async.",
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="b64_json by default; binary only for a single result."
    )
    webhook_url: UrlText | None = Field(
        default=None,
        max_length=2000,
        json_schema_extra={"pattern": "^[!-~]*$"},
        description="URL to call when the job ends; its host must be allowed. The call is signed after Standard "
        "Webhooks.",
    )


class ImageBody(GenerationBody):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "a red circle above a blue square", "budget": {"quality": 0.9}}]},
    )

    model: Text | None = Field(
        default=None, description="An id from /v1/models; the server's first image model by default."
    )
    prompt: str = Field(min_length=1, description="What the image shows. The model limits its number of characters.")
    negative_prompt: Text | None = Field(
        default=None,
        description="What the image should not show; only with true classifier-free guidance. For models whose "
        "`guidance` in /v1/models is true, that is a `guidance_scale` above 1, and this is empty by default. For other "
        "models it is a `true_cfg_scale` above 1, which requires this field.",
    )
    true_cfg_scale: Number | None = Field(
        default=None,
        ge=1,
        le=100,
        description="True classifier-free guidance, in addition to `guidance_scale`; 1 is off. Not for models whose "
        "`guidance` in /v1/models is true.",
    )
    n: Integer | None = Field(
        default=None, ge=1, le=8, description="How many images, with the seeds seed, seed + 1, …; 1 by default."
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
        description="The model has a default. Its `guidance` in /v1/models says what this is. distilled: an input of "
        "the model. none: no effect. true: classifier-free guidance, off up to 1, twice the compute above.",
    )
    quality: QualityWord | None = Field(
        default=None,
        description="OpenAI's field instead of a budget. low is the preset draft, medium is fast, high is high, hd is "
        "exact; auto and standard are the server's default budget.",
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
        _unless(("auto", "opaque", None), "images are always opaque; omit background, or use 'opaque' or 'auto'"),
    ] = Field(default=None, description="OpenAI's field; images are always opaque.")
    moderation: Annotated[
        Literal["auto", "low"] | None,
        _unless(("auto", "low", None), "moderation can be 'auto' or 'low'; this server does not filter at all"),
    ] = Field(default=None, description="OpenAI's field; this server does not filter prompts or images.")
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
        min_length=1, description="The image of one object, as base64 or as a `data:` URL: PNG, JPEG or WebP."
    )
    remove_background: Annotated[
        Literal["auto"] | bool | None,
        _unless(("auto", True, False, None), "remove_background can be 'auto', true or false"),
    ] = Field(
        default=None,
        description="Whether to cut the object out of a plain background. auto, the default, does so if the image has "
        "no transparency.",
    )
    guidance_scale: Number | None = Field(
        default=None,
        ge=0,
        le=100,
        description="The model has a default. If its `guidance` in /v1/models is true, 1 is off, and any other scale "
        "takes twice the compute.",
    )
    octree_resolution: Integer | None = Field(
        default=None, description="Cells along a side of the grid; the model has a default and limits."
    )
    target_faces: Integer | None = Field(
        default=None,
        ge=MIN_TARGET_FACES,
        description="The largest number of triangles; by default the mesh is not reduced.",
    )
    output_format: MeshFormat | None = Field(default=None, description="glb by default.")
