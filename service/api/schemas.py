"""The bodies of requests, as clients write them. `parsing` checks the limits of the model."""

import re
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, StrictBool
from pydantic_core import PydanticCustomError, PydanticKnownError

from models.file_formats import MeshFormat, OutputFormat
from models.request import MIN_TARGET_FACES
from service.api.validation import shown
from service.budget import BudgetBody, ClosedBody, Number
from service.jobs.job import Priority

MAX_SEED = 2**63 - 1

SIZE_PATTERN = "^([0-9]{1,5}x[0-9]{1,5}|auto)$"

DEFAULT_STRENGTH, DEFAULT_MASKED_STRENGTH = 0.8, 1.0
"""Of edits, see docs/decisions/0026-masks-and-strengths.md."""

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
    if (wrong := re.search(r"[^!-~]", value)) is not None:
        message = f"webhook_url has the character {shown(wrong[0])}, which no URL has; percent-encode it"
        raise PydanticCustomError("unsupported", "{message}", {"message": message})
    return value


UrlText = Annotated[str, AfterValidator(_check_url_characters)]


class QualityWord(StrEnum):
    """OpenAI's levels of quality."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    XHIGH = "xhigh"
    MAX = "max"
    AUTO = "auto"
    STANDARD = "standard"
    HD = "hd"


class ResponseFormat(StrEnum):
    B64_JSON = "b64_json"
    URL = "url"
    BINARY = "binary"


def _unless(name: str, accepted: tuple[object, ...], message: str) -> BeforeValidator:
    """Refuse all values of the field `name` but `accepted`. The message begins with the value."""

    def check(value: object) -> object:
        if not any(value is accept or (isinstance(accept, str) and value == accept) for accept in accepted):
            text = f"{name} {shown(value)} {message}"
            raise PydanticCustomError("unsupported", "{message}", {"message": text})
        return value

    return BeforeValidator(check)


def _check_seed(value: object) -> object:
    """Elsewhere -1 asks for a random seed."""
    if isinstance(value, int) and value < 0:
        message = f"seed {shown(value)} is below 0; leave seed out for a random one"
        raise PydanticCustomError("unsupported", "{message}", {"message": message})
    return value


class GenerationBody(ClosedBody):
    """The fields that image and mesh requests share."""

    num_inference_steps: Integer | None = Field(
        default=None,
        ge=1,
        description="Denoise steps; the model has a default. The budget decides how many of them are computed; the "
        "others are forecast.",
    )
    seed: Annotated[Integer | None, BeforeValidator(_check_seed)] = Field(
        default=None, ge=0, le=MAX_SEED, description="Random if absent; always returned."
    )
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
        default=None,
        description="b64_json by default, unless the server has another default; url if the model is asked for as "
        "`dall-e-…`. In events always b64_json by default. binary only for a single result.",
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
        default=None,
        description="An id from /v1/models, or a name that the server's aliases map to one; if empty, the server's "
        "first image model.",
    )
    prompt: str = Field(
        min_length=1,
        description="What the image shows; for models made for editing, what to change. The model limits its length.",
    )
    negative_prompt: Text | None = Field(
        default=None,
        description="What the image should not show; only with true classifier-free guidance, unless it is empty. For "
        "models whose `guidance` in /v1/models is true, that is a `guidance_scale` above 1, and this is empty by "
        "default. For other models it is a `true_cfg_scale` above 1, which requires this field.",
    )
    true_cfg_scale: Number | None = Field(
        default=None,
        ge=1,
        le=100,
        description="True classifier-free guidance, in addition to `guidance_scale`; 1 is off. Not for models whose "
        "`guidance` in /v1/models is true.",
    )
    n: Integer | None = Field(
        default=None, ge=1, le=10, description="How many images, with the seeds seed, seed + 1, …; 1 by default."
    )
    size: Text | None = Field(
        default=None,
        json_schema_extra={"pattern": SIZE_PATTERN},
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
        description="OpenAI's field instead of a budget. low is the preset draft, medium is fast, high is high; xhigh, "
        "max and hd are exact; auto and standard are the server's default budget.",
    )
    output_format: OutputFormat | None = Field(default=None, description="png by default.")
    output_compression: Integer | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Quality of webp and jpeg files: 100 is the largest and best, default 95. PNG files are always "
        "lossless; for them it can be 100.",
    )
    metadata: StrictBool = Field(
        default=True,
        description="Whether PNG and WebP files carry prompt, seed, model and budget. JPEG files never do.",
    )
    steps: Integer | None = Field(default=None, ge=1, description="LobeChat's word for `num_inference_steps`.")
    cfg: Number | None = Field(default=None, ge=0, le=100, description="LobeChat's word for `guidance_scale`.")
    background: Literal["auto", "opaque", "transparent"] | None = Field(
        default=None,
        description="transparent cuts the object out of the finished image, in png and webp files. auto, the default, "
        "is opaque.",
    )
    moderation: Annotated[
        Literal["auto", "low"] | None,
        _unless("moderation", ("auto", "low", None), "is not 'auto' or 'low'; this server does not filter at all"),
    ] = Field(default=None, description="OpenAI's field; this server does not filter prompts or images.")
    user: Text | None = Field(default=None, description="OpenAI's field; without effect.")
    safety_identifier: Text | None = Field(default=None, description="OpenAI's field; without effect.")
    style: Text | None = Field(
        default=None, description="OpenAI's field; without effect. Describe the style in the prompt."
    )
    complexity: Text | None = Field(default=None, description="OpenAI's field; without effect.")
    frame_count: Annotated[
        Integer | None, _unless("frame_count", (1, None), "is not possible: images have one frame; try 1")
    ] = Field(default=None, ge=1, le=1, description="OpenAI's field for animations, which this server does not make.")
    frame_duration_ms: Annotated[
        None, _unless("frame_duration_ms", (None,), "is not possible: images have one frame; leave it out")
    ] = Field(default=None, description="OpenAI's field for animations, which this server does not make.")
    svg: Annotated[
        None, _unless("svg", (None,), "is not possible: this server makes png, webp and jpeg files; leave it out")
    ] = Field(default=None, description="OpenAI's field for vector graphics, which this server does not make.")
    markup: Annotated[
        None, _unless("markup", (None,), "is not possible: this server reads no markup; leave it out")
    ] = Field(default=None, description="OpenAI's field for marks on a picture, which this server does not read.")


MAX_PICTURES = 16
"""OpenAI's limit. Models have lower ones."""


class PictureReference(ClosedBody):
    """OpenAI's way to give a picture in JSON."""

    image_url: str = Field(min_length=1, description="A base64 `data:` URL; other URLs are not fetched.")


def _text_of_picture(value: object) -> object:
    """The text of OpenAI's `{"image_url": "data:…"}`; anything else as it is."""
    if not isinstance(value, dict):
        return value
    if value.keys() != {"image_url"}:
        message = f'a picture is base64 text, a data: URL or {{"image_url": a data: URL}}, not {shown(value)}'
        raise PydanticCustomError("unsupported", "{message}", {"message": message})
    return value["image_url"]


PictureText = Annotated[str, Field(min_length=1)]
AnyPicture = Annotated[PictureText, BeforeValidator(_text_of_picture, json_schema_input_type=str | PictureReference)]
Pictures = Annotated[list[PictureText], Field(min_length=1, max_length=MAX_PICTURES)]


class EditBody(ImageBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"prompt": "a green circle", "image": "data:image/png;base64,iVBORw0KGgo…", "strength": 0.8}]
        },
    )

    image: Annotated[
        Pictures | None,
        BeforeValidator(
            lambda value: [value] if isinstance(value, str) else value,
            json_schema_input_type=PictureText | Pictures | None,
        ),
    ] = Field(
        default=None,
        description="The picture to edit, as base64 or as a `data:` URL: PNG, JPEG or WebP. Models whose "
        "`max_input_images` in /v1/models is above 1 also take a list.",
    )
    images: Annotated[list[AnyPicture], Field(min_length=1, max_length=MAX_PICTURES)] | None = Field(
        default=None, description="OpenAI's field for `image` in JSON; one of the two is required."
    )
    mask: AnyPicture | None = Field(
        default=None,
        description="What may change, as a picture of the same size; by default, all. Only for models whose `edits` in "
        "/v1/models is noised. If it has transparency, its transparent parts may change (OpenAI's masks), else its "
        "white parts (diffusers').",
    )
    strength: Number | None = Field(
        default=None,
        gt=0,
        le=1,
        description=f"How far the result may be from the picture: the share of the denoise steps that are taken. "
        f"{DEFAULT_STRENGTH:g} by default, {DEFAULT_MASKED_STRENGTH:g} with a mask. Only for models whose `edits` in "
        "/v1/models is noised.",
    )
    size: Text | None = Field(
        default=None,
        json_schema_extra={"pattern": SIZE_PATTERN},
        description='"WIDTHxHEIGHT" in pixels. "auto", the default, is near the size of the picture, with about '
        "the pixels of the model's default size at most. Or use `width` and `height`.",
    )
    input_fidelity: Annotated[
        Literal["low", "high"] | None,
        _unless("input_fidelity", ("low", "high", None), "is not 'low' or 'high'; it has no effect here: use strength"),
    ] = Field(default=None, description="OpenAI's field; without effect. See `strength`.")


class MeshBody(GenerationBody):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"input_image": "data:image/png;base64,iVBORw0KGgo…", "budget": {"quality": 0.9}}]
        },
    )

    model: Text | None = Field(
        default=None,
        description="An id from /v1/models, or a name that the server's aliases map to one; if empty, the server's "
        "first mesh model.",
    )
    input_image: str = Field(
        min_length=1, description="The image of one object, as base64 or as a `data:` URL: PNG, JPEG or WebP."
    )
    remove_background: Annotated[
        Literal["auto"] | bool | None,
        _unless("remove_background", ("auto", True, False, None), "is not 'auto', true or false"),
    ] = Field(
        default=None,
        description="Whether to cut the object out of its background. auto, the default, does so if the image has no "
        "transparency. true ignores transparency.",
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
