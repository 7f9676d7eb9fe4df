"""What a loaded model is and can do, as plain data: no torch here, since the API side reads it too."""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, ClassVar

from models.curve import CurvePoint


class Guidance(StrEnum):
    """What a model's `guidance_scale` is."""

    DISTILLED = "distilled"  # an input of the transformer; true guidance by `true_cfg_scale` besides: FLUX.1-dev
    NONE = "none"  # without effect: the model is distilled to need none; `true_cfg_scale` as above: FLUX.1-schnell
    TRUE = "true"  # true classifier-free guidance itself, and there is no `true_cfg_scale`: Qwen-Image


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """Heights and widths in pixels that a model serves: multiples of `multiple_of` from `minimum` to `maximum`."""

    multiple_of: int
    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """Identity, defaults, limits and curve of one model, as `/v1/models` shows them.

    `curve` begins with EXACT and descends in both compute and quality. `dense_step_seconds` is the time of one dense
    denoise step at the defaults on this device, and `call_share` that part of it, from 0 to 1, which does not grow with
    the rows of a batch, both measured when the model is loaded. `blocks` are the block names.
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
    call_share: float
    max_batch_size: int

    def is_guided(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> bool:
        """Whether true classifier-free guidance is on at these scales: every step then runs on two rows."""
        return (guidance_scale if self.guidance is Guidance.TRUE else true_cfg_scale) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageCard(ModelCard):
    """A model that draws pictures from texts; sides are in pixels."""

    modality: ClassVar[str] = "image"

    default_height: int
    default_width: int
    sizes: SizeLimits
    max_prompt_characters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshCard(ModelCard):
    """A model that makes meshes from pictures; an octree resolution counts cells of the field's grid along a side.

    Resolutions are multiples of `octree_resolution_step`.
    """

    modality: ClassVar[str] = "mesh"

    default_octree_resolution: int
    min_octree_resolution: int
    max_octree_resolution: int
    octree_resolution_step: int

    def is_guided(self, guidance_scale: float, true_cfg_scale: float = 1.0) -> bool:
        """At a scale of 1 the branch without an image cancels out; below, unlike in diffusers, it does not."""
        return self.guidance is Guidance.TRUE and guidance_scale != 1


def basics_of(card: ModelCard) -> dict[str, Any]:
    """The fields that every card has."""
    return {field.name: getattr(card, field.name) for field in fields(ModelCard)}
