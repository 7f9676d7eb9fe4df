"""From a request's body to an order that the model can serve."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

from models.budget import resolve
from models.card import Guidance, ImageCard, MeshCard, ModelCard, SizeLimits
from models.curve import EXACT, CurvePoint, Preset
from models.errors import InvalidRequest
from models.file_formats import MeshFormat, OutputFormat
from models.request import (
    BackgroundRemoval,
    Budget,
    ImageEdit,
    ImageRequest,
    LatencyBudget,
    MeshRequest,
    PresetBudget,
    QualityBudget,
)
from service.api.edits import CheckedPictures, parse_edit, size_of_edit
from service.api.schemas import MAX_SEED, EditBody, ImageBody, MeshBody, QualityWord, ResponseFormat
from service.api.sizes import nearest_size
from service.api.validation import shown
from service.budget import BudgetBody
from service.order import Order, Output, QualityLevel

# Random seeds stay exact in JSON readers that hold numbers as doubles (RFC 8259, section 6).
RANDOM_SEEDS = 2**53 - 8

Scalar = TypeVar("Scalar", int, float)

_SIZE = re.compile(r"([0-9]{1,5})x([0-9]{1,5})", re.ASCII)

_PRESETS_OF_WORDS = {
    QualityWord.LOW: Preset.DRAFT,
    QualityWord.MEDIUM: Preset.FAST,
    QualityWord.HIGH: Preset.HIGH,
    QualityWord.XHIGH: Preset.EXACT,
    QualityWord.MAX: Preset.EXACT,
    QualityWord.HD: Preset.EXACT,
}


_LEVELS: Mapping[str, QualityLevel] = {level.value: level for level in QualityLevel}


def parse_image_body(body: ImageBody, card: ImageCard, *, default_budget: BudgetBody, random_seed: int) -> Order:
    """The order of `body` for the model of `card`: `n` requests with consecutive seeds. Raises InvalidRequest."""
    if card.needs_input_image:
        raise InvalidRequest(
            f"model {shown(card.id)} makes images of pictures only; send one to /v1/images/edits, or choose a model "
            "whose needs_input_image in /v1/models is false",
            "model",
        )
    auto_size = (card.default_width, card.default_height)
    return _parse_images(body, card, None, auto_size, default_budget=default_budget, random_seed=random_seed)


def parse_edit_body(
    body: EditBody, card: ImageCard, pictures: CheckedPictures, *, default_budget: BudgetBody, random_seed: int
) -> Order:
    """The order of `body`, whose `pictures` were checked, as `parse_image_body` makes one. Raises InvalidRequest."""
    edit, auto_size = parse_edit(body, card, pictures), size_of_edit(pictures, card)
    return _parse_images(body, card, edit, auto_size, default_budget=default_budget, random_seed=random_seed)


def _parse_images(
    body: ImageBody,
    card: ImageCard,
    edit: ImageEdit | None,
    auto_size: tuple[int, int],
    *,
    default_budget: BudgetBody,
    random_seed: int,
) -> Order:
    """`auto_size` is the width and height that the size "auto" means."""
    _check_prompt(body, card)
    is_transparent = _parse_background(body, card)
    guidance_scale, true_cfg_scale = _parse_guidance(body, card)
    is_guided = card.is_guided(guidance_scale, true_cfg_scale)
    width, height = _parse_size(body, card, auto_size)
    steps = _parse_steps(_agreed("num_inference_steps", body.num_inference_steps, "steps", body.steps), card)
    seeds = _parse_seeds(body, random_seed)
    budget, min_quality = _parse_image_budget(body, default_budget)
    first = ImageRequest(
        model=card.id,
        prompt=body.prompt,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        seed=seeds[0],
        budget=budget,
        point=EXACT,
        is_guided=is_guided,
        negative_prompt=body.negative_prompt if is_guided else None,
        true_cfg_scale=true_cfg_scale,
        wants_trace=body.trace,
        edit=edit,
        is_transparent=is_transparent,
    )
    curve = card.curve_for(first)
    first = replace(first, point=resolve(budget, curve))
    requests = tuple(replace(first, seed=seed) for seed in seeds)
    output = replace(_parse_image_output(body), quality_level=_quality_level(body, first, curve))
    return Order(requests, output, _quality_requested(budget, first.point), min_quality)


def parse_mesh_body(
    body: MeshBody, card: MeshCard, input_image: bytes, *, default_budget: BudgetBody, random_seed: int
) -> Order:
    """The order of `body` for the model of `card`. `input_image` is the checked image file. Raises InvalidRequest."""
    budget_body = body.budget or default_budget
    budget = budget_body.to_budget()
    guidance_scale = card.default_guidance_scale if body.guidance_scale is None else body.guidance_scale
    request = MeshRequest(
        model=card.id,
        num_inference_steps=_parse_steps(body.num_inference_steps, card),
        guidance_scale=guidance_scale,
        seed=random_seed if body.seed is None else body.seed,
        budget=budget,
        point=EXACT,
        is_guided=card.is_guided(guidance_scale),
        wants_trace=body.trace,
        input_image=input_image,
        octree_resolution=_parse_octree_resolution(body, card),
        target_faces=body.target_faces,
        remove_background=_REMOVALS[body.remove_background],
    )
    request = replace(request, point=resolve(budget, card.curve_for(request)))
    output = Output(body.output_format or MeshFormat.GLB)
    return Order((request,), output, _quality_requested(budget, request.point), budget_body.min_quality)


_REMOVALS: Mapping[Literal["auto"] | bool | None, BackgroundRemoval] = {
    None: BackgroundRemoval.AUTO,
    "auto": BackgroundRemoval.AUTO,
    True: BackgroundRemoval.ALWAYS,
    False: BackgroundRemoval.NEVER,
}


def _parse_seeds(body: ImageBody, random_seed: int) -> range:
    n = 1 if body.n is None else body.n
    seed = random_seed if body.seed is None else body.seed
    if seed + n - 1 > MAX_SEED:
        raise InvalidRequest(
            f"seed {seed} leaves no room for {n} consecutive seeds below 2^63; try {MAX_SEED - n + 1}", "seed"
        )
    return range(seed, seed + n)


def _parse_background(body: ImageBody, card: ImageCard) -> bool:
    """Whether the image is transparent around its object. The one place that says which backgrounds it can have."""
    if body.background != "transparent":
        return False
    output_format = body.output_format or OutputFormat.PNG
    if not output_format.has_alpha:
        raise InvalidRequest(
            f"background 'transparent' is not possible in {output_format} files; try output_format png or webp, or "
            "background 'opaque'",
            "background",
        )
    if not card.can_be_transparent:
        raise InvalidRequest(
            "background 'transparent' is not possible: this server has no background remover (its setting "
            "background_remover); try 'opaque' or 'auto'",
            "background",
        )
    return True


def _parse_image_output(body: ImageBody) -> Output:
    output_format, compression = body.output_format or OutputFormat.PNG, body.output_compression
    if not output_format.is_lossy and compression is not None:
        if compression != 100:
            raise InvalidRequest(
                f"output_compression {compression} applies to webp and jpeg; output_format is {output_format}, which "
                "is lossless; try 100",
                "output_compression",
            )
        compression = None
    if body.response_format is ResponseFormat.BINARY and body.n is not None and body.n > 1:
        raise InvalidRequest(f"response_format binary answers one image, not n = {body.n}; try url", "response_format")
    return Output(output_format, compression, body.metadata)


def _quality_requested(budget: Budget, point: CurvePoint) -> float | None:
    """The quality that `budget`, resolved to `point`, names. A compute ratio and a deadline name none."""
    match budget:
        case QualityBudget(quality):
            return quality
        case PresetBudget():
            return point.quality
        case _:
            return None


def _quality_level(body: ImageBody, request: ImageRequest, curve: Sequence[CurvePoint]) -> QualityLevel | None:
    """The client's own word, or the best one whose preset is no better than the request's point on the curve."""
    if (asked := _LEVELS.get(body.quality or "")) is not None:
        return asked
    if isinstance(request.budget, LatencyBudget):
        return None  # the worker chooses the point
    if request.point.is_exact:
        return QualityLevel.MAX
    best_first = ((QualityLevel.HIGH, Preset.HIGH), (QualityLevel.MEDIUM, Preset.FAST))
    offered = {point.preset: point.quality for point in curve}
    able = (level for level, preset in best_first if preset in offered and offered[preset] <= request.point.quality)
    return next(able, QualityLevel.LOW)


def _agreed(name: str, value: Scalar | None, other_name: str, other: Scalar | None) -> Scalar | None:
    """The value of a field that has two names. Raises InvalidRequest if they disagree."""
    if value is not None and other is not None and value != other:
        raise InvalidRequest(
            f"{name} {shown(value)} and {other_name} {shown(other)} say the same thing, and disagree; give {name}",
            other_name,
        )
    return other if value is None else value


def _parse_steps(asked: int | None, card: ModelCard) -> int:
    steps = card.default_num_inference_steps if asked is None else asked
    if steps > card.max_num_inference_steps:
        raise InvalidRequest(
            f"num_inference_steps {shown(steps)} is above the limit of {card.id}; try {card.max_num_inference_steps}",
            "num_inference_steps",
        )
    return steps


def _parse_octree_resolution(body: MeshBody, card: MeshCard) -> int:
    if body.octree_resolution is None:
        return card.default_octree_resolution
    limits = SizeLimits(card.octree_resolution_step, card.min_octree_resolution, card.max_octree_resolution)
    _check_side("octree_resolution", body.octree_resolution, limits, param="octree_resolution")
    return body.octree_resolution


def _check_prompt(body: ImageBody, card: ImageCard) -> None:
    for param, text in (("prompt", body.prompt), ("negative_prompt", body.negative_prompt)):
        if text is not None and len(text) > card.max_prompt_characters:
            raise InvalidRequest(
                f"{param} has {len(text)} characters; {card.id} takes at most {card.max_prompt_characters}", param
            )


def _parse_guidance(body: ImageBody, card: ModelCard) -> tuple[float, float]:
    """`guidance_scale` and `true_cfg_scale`. The model's card says which one is true classifier-free guidance."""
    asked = _agreed("guidance_scale", body.guidance_scale, "cfg", body.cfg)
    guidance_scale = card.default_guidance_scale if asked is None else asked
    true_cfg_scale = 1.0 if body.true_cfg_scale is None else body.true_cfg_scale
    is_guided = card.is_guided(guidance_scale, true_cfg_scale)
    if card.guidance is Guidance.TRUE:
        param, scale = "guidance_scale", guidance_scale
        if body.true_cfg_scale is not None:
            raise InvalidRequest(
                f"true_cfg_scale {true_cfg_scale:g} cannot be used here: guidance_scale is the true classifier-free "
                f"guidance of {card.id}; omit true_cfg_scale",
                "true_cfg_scale",
            )
    else:
        param, scale = "true_cfg_scale", true_cfg_scale
        if is_guided and body.negative_prompt is None:
            raise InvalidRequest(
                f"true_cfg_scale {scale:g} needs a negative_prompt, which may be empty", "negative_prompt"
            )
    if not is_guided and body.negative_prompt:
        raise InvalidRequest(
            f"negative_prompt {shown(body.negative_prompt)} cannot be used here: without true classifier-free guidance "
            f"it has no effect; set {param} above 1, not {scale:g}",
            "negative_prompt",
        )
    return guidance_scale, true_cfg_scale


def _parse_size(body: ImageBody, card: ImageCard, auto_size: tuple[int, int]) -> tuple[int, int]:
    """Width and height in pixels."""
    if (body.width is None) != (body.height is None):
        missing = "height" if body.height is None else "width"
        raise InvalidRequest(f"width and height go together; {missing} is missing", missing)
    explicit = None if body.width is None or body.height is None else (body.width, body.height)
    from_text = None if body.size is None else _size_of_text(body.size, auto_size)
    if explicit and from_text and explicit != from_text:
        raise InvalidRequest(
            f"size {body.size}, width {shown(body.width)} and height {shown(body.height)} disagree; give one of them",
            "size",
        )
    width, height = explicit or from_text or auto_size
    for name, pixels in (("width", width), ("height", height)):
        _check_side(name, pixels, card.sizes, param=name if explicit else "size")
    return width, height


def _size_of_text(size: str, auto_size: tuple[int, int]) -> tuple[int, int]:
    if size == "auto":
        return auto_size
    match = _SIZE.fullmatch(size)
    if match is None:
        raise InvalidRequest(
            f"size {shown(size)} is not WIDTHxHEIGHT in pixels or auto, such as {auto_size[0]}x{auto_size[1]}", "size"
        )
    return int(match[1]), int(match[2])


def _check_side(name: str, pixels: int, sizes: SizeLimits, *, param: str) -> None:
    nearest = nearest_size(pixels, sizes)
    if pixels == nearest:
        return
    if sizes.minimum <= pixels <= sizes.maximum:
        problem = f"is not a multiple of {sizes.multiple_of}"
    else:
        problem = f"is not within {sizes.minimum} to {sizes.maximum}"
    raise InvalidRequest(f"{name} {shown(pixels)} {problem}; try {nearest}", param)


def _parse_image_budget(body: ImageBody, default_budget: BudgetBody) -> tuple[Budget, float | None]:
    """The budget and its `min_quality`. OpenAI's `quality` words have none, so load never lowers them."""
    if body.budget is not None and body.quality is not None:
        raise InvalidRequest(f"quality '{body.quality}' and budget say the same thing; give one of the two", "quality")
    if body.quality is not None and body.quality in _PRESETS_OF_WORDS:
        return PresetBudget(_PRESETS_OF_WORDS[body.quality]), None
    asked = body.budget or default_budget
    return asked.to_budget(), asked.min_quality
