"""The description of a loaded model, as plain data. No torch: the API side reads it too."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from statistics import fmean
from typing import Any, ClassVar

from models.curve import CurvePoint
from models.errors import WeightsError
from models.memory import ModelMemory, RequestMemory, readable
from models.mesh import size
from models.request import GenerationRequest, ImageRequest, LatencyBudget


class Guidance(StrEnum):
    """The meaning of a model's `guidance_scale`."""

    DISTILLED = "distilled"  # an input of the transformer; `true_cfg_scale` adds true guidance (FLUX.1-dev)
    NONE = "none"  # without effect; `true_cfg_scale` adds true guidance (FLUX.1-schnell)
    TRUE = "true"  # true classifier-free guidance; there is no `true_cfg_scale` (Qwen-Image)


class Edits(StrEnum):
    """How a model edits pictures."""

    NOISED = "noised"  # from the picture with noise on, so there are a strength and a mask (FLUX.1, Qwen-Image)
    REFERENCE = "reference"  # it reads the pictures beside the noise (FLUX.1-Kontext, Qwen-Image-Edit)


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """Valid heights and widths in pixels: multiples of `multiple_of` from `minimum` to `maximum`."""

    multiple_of: int
    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureSizes:
    """The sizes in pixels at which a model reads pictures.

    They are those of `preferred`, `(width, height)` each, or have an `area` and sides that are multiples of 32. The
    ratio of a picture is that of its sides in whole units of `ratio_unit` pixels.
    """

    preferred: tuple[tuple[int, int], ...] = ()
    area: int = 0
    ratio_unit: int = 1

    @property
    def num_pixels(self) -> float:
        """Pixels of a picture as it is read, about as many for each."""
        return self.area or fmean(width * height for width, height in self.preferred)

    def of(self, width: int, height: int) -> tuple[int, int]:
        """Width and height at which a picture of `width` x `height` pixels is read: about the same ratio.

        As FluxKontextPipeline chooses them, and `calculate_dimensions` of Qwen-Image's editing pipelines.
        """
        ratio = max(1, width // self.ratio_unit) / max(1, height // self.ratio_unit)
        if self.preferred:
            _, width, height = min((abs(ratio - width / height), width, height) for width, height in self.preferred)
            return width, height
        exact_width = math.sqrt(self.area * ratio)
        return 32 * round(exact_width / 32), 32 * round(exact_width / ratio / 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Identity, defaults, limits and curve of one model, as `/v1/models` shows them.

    `curve` begins with EXACT and descends in both compute and quality. `dense_step_seconds` is the time of one dense
    denoise step at the defaults on this device. `fixed_share`, from 0 to 1, is the part of it that does not grow with
    the rows of a batch. `encode_seconds` is the time to encode a prompt or an image. They are measured when the model
    is loaded. `blocks` are the block names. `memory` says what the model and its requests take of the device.
    `joins_branches` says whether an exact step is one call for all guidance branches, else one for each; all other
    steps are one call.
    """

    modality: ClassVar[str]

    id: str
    family: str
    license: str
    created: int
    default_num_inference_steps: int
    default_guidance_scale: float
    max_num_inference_steps: int
    guidance: Guidance
    rules: tuple[str, ...]
    quality_metric: str
    curve: tuple[CurvePoint, ...]
    blocks: tuple[str, ...]
    dense_step_seconds: float
    fixed_share: float
    encode_seconds: float
    max_batch_size: int
    memory: ModelMemory
    joins_branches: bool = True

    def is_guided(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> bool:
        """Whether true classifier-free guidance is on at these scales: every step then runs on two rows."""
        return (guidance_scale if self.guidance is Guidance.TRUE else true_cfg_scale) > 1

    def curve_for(self, request: GenerationRequest) -> tuple[CurvePoint, ...]:
        """The curve for the steps that this request takes. Its points say whether they were calibrated for it."""
        is_calibrated = self._is_calibrated_for(request)
        points = [
            point.at(
                request.num_steps,
                self._num_needed(point, request),
                is_calibrated=is_calibrated,
                is_cheapest=point is self.curve[-1],
            )
            for point in self.curve
        ]
        return tuple(sorted(points, key=lambda point: -point.compute_ratio))  # some may have become exact

    def memory_of(self, request: GenerationRequest) -> RequestMemory:
        """What `request` takes of the device, at most, at all points of the curve that it may reach."""
        points = [request.point]
        if isinstance(request.budget, LatencyBudget):
            points += self.curve
        elif request.compute_cap is not None and not request.point.steps:
            points += [point for point in self.curve if point.rule == request.point.rule]
        return self.memory.of(
            request,
            reuses_blocks=any(point.policy.may_reuse for point in points),
            forecasts_steps=any(point.steps for point in points),
        )

    def _num_needed(self, point: CurvePoint, request: GenerationRequest) -> int:
        """How many steps of `request` are computed for the quality of `point`.

        A schedule of more or fewer steps follows nearly the same trajectory. So it needs as many computed steps.
        """
        return point.steps.computed if point.steps else request.num_steps

    def _is_calibrated_for(self, request: GenerationRequest) -> bool:
        """Whether the curve, which is measured at the defaults, holds: so it does at half and at twice the guidance."""
        default = self.default_guidance_scale
        return (
            request.num_inference_steps == self.default_num_inference_steps
            and request.is_guided == self.is_guided(default)
            and (self.guidance is Guidance.NONE or default / 2 <= request.guidance_scale <= default * 2)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageCard(ModelCard):
    """A text-to-image model. Heights and widths are in pixels.

    `decode_seconds` is the time to decode an image of the default size to a PNG file, measured when the model is
    loaded. `picture_seconds` is what a picture to edit, of this size, adds to `encode_seconds`. An edit has at most
    `max_input_images` pictures; with `needs_input_image` there is no image without one. Models that read pictures
    beside the noise have `picture_sizes`; what was measured of them was measured with one picture.

    `edit_steps[taken - 1][computed - 1]` says how many of the last `taken` steps of the calibrated schedule are worth
    `computed` of all its steps, by the errors that calibration predicts. It is empty if steps can't be forecast.
    `can_be_transparent` says whether objects can be cut out of finished images.
    """

    modality: ClassVar[str] = "image"

    default_height: int
    default_width: int
    decode_seconds: float = math.inf
    picture_seconds: float = 0.0
    sizes: SizeLimits
    max_prompt_characters: int
    max_input_images: int = 1
    needs_input_image: bool = False
    picture_sizes: PictureSizes | None = None
    edit_steps: tuple[tuple[int, ...], ...] = ()
    can_be_transparent: bool = False

    @property
    def edits(self) -> Edits:
        return Edits.NOISED if self.picture_sizes is None else Edits.REFERENCE

    def size_of_edit(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of the edit of a picture of `width` x `height` pixels, if its client asks for no size.

        For models that read pictures beside the noise. It is the size at which the picture is read, made smaller in
        proportion if it exceeds the model's limits. Of several pictures, the last one counts, as in the stock pipeline.
        (The stock Kontext pipeline makes every image square if not told otherwise, which would distort pictures.)
        """
        assert self.picture_sizes is not None
        read, limits = self.picture_sizes.of(width, height), self.sizes
        scale = min(1.0, limits.maximum / max(read))
        width, height = (
            max(limits.minimum, int(side * scale) // limits.multiple_of * limits.multiple_of) for side in read
        )
        return width, height

    def relative_size(self, request: ImageRequest) -> float:
        """Pixels that a step of `request` computes, relative to the step that was measured.

        They are those of the image and, for models that read pictures beside the noise, of the pictures: one was there.
        """
        image, usual = request.height * request.width, self.default_height * self.default_width
        if self.picture_sizes is None:
            return image / usual
        picture = self.picture_sizes.num_pixels
        return (image + _num_pictures(request) * picture) / (usual + picture)

    def _num_needed(self, point: CurvePoint, request: GenerationRequest) -> int:
        """As in `ModelCard`. Edits begin where there is less noise, and less to be uncertain of."""
        if not point.steps or not self.edit_steps:
            return ModelCard._num_needed(self, point, request)
        taken = math.ceil(request.num_steps / request.num_inference_steps * len(self.edit_steps) - 1e-9)
        return self.edit_steps[taken - 1][point.steps.computed - 1]

    def _is_calibrated_for(self, request: GenerationRequest) -> bool:
        assert isinstance(request, ImageRequest)
        is_usual_size = (request.height, request.width) == (self.default_height, self.default_width)
        is_usual = is_usual_size and _num_pictures(request) == (self.edits is Edits.REFERENCE)
        # Not super(): dataclasses with slots are made anew, which breaks it in older versions of Python.
        return is_usual and ModelCard._is_calibrated_for(self, request)


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """Seconds that the parts of a mesh's decoding take, measured on this device.

    To read the field at a point, to search a grid per point of it, and to make a triangle of the file.
    """

    field_point: float
    grid_point: float
    face: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshCard(ModelCard):
    """An image-to-mesh model.

    An octree resolution is the number of grid cells along each side of the field, a multiple of
    `octree_resolution_step`.
    """

    modality: ClassVar[str] = "mesh"

    default_octree_resolution: int
    min_octree_resolution: int
    max_octree_resolution: int
    octree_resolution_step: int
    decode_speed: DecodeSpeed

    def decode_seconds(self, octree_resolution: int) -> float:
        """Predicted seconds from the last step to the file, of a typical shape with all its faces."""
        speed = self.decode_speed
        return (
            size.num_field_points(octree_resolution) * speed.field_point
            + size.num_grid_points(octree_resolution) * speed.grid_point
            + size.num_faces(octree_resolution) * speed.face
        )

    def is_guided(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> bool:
        """At a scale of 1 the branch without an image cancels out. Unlike in diffusers, it counts below 1 too."""
        return self.guidance is Guidance.TRUE and guidance_scale != 1


def shared_device(cards: Mapping[str, ModelCard]) -> dict[str, ModelCard]:
    """`cards` of models that share a device: the memory of each says how much the weights of all take.

    Raises WeightsError if they leave no room for requests.
    """
    weights = sum(card.memory.weights for card in cards.values())
    shared = {model: replace(card, memory=replace(card.memory, all_weights=weights)) for model, card in cards.items()}
    for card in shared.values():
        if card.memory.room <= 0:
            raise WeightsError(
                f"the weights of {', '.join(cards)} take {readable(weights)}; the device has "
                f"{readable(card.memory.limit)} for them and for requests, of which {readable(card.memory.reserve)} "
                "are kept free; serve fewer models, keep parts on the CPU (offload) or allow more (device_memory)"
            )
    return shared


def _num_pictures(request: ImageRequest) -> int:
    return len(request.edit.images) if request.edit else 0


def basics_of(card: ModelCard) -> dict[str, Any]:
    """The fields that every card has."""
    return {field.name: getattr(card, field.name) for field in fields(ModelCard)}
