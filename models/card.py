"""What a loaded model is and can do, as plain data: no torch here, since the API side reads it too."""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, ClassVar

from models.request import Preset


@dataclass(frozen=True, slots=True)
class Policy:
    """A rule's settings for one request.

    Rule `router`: a block whose depth probability is under `skip_threshold` is skipped; from there up to
    `skip_threshold + reuse_band` its stored residual is added again, at most `max_reuses` times after it was computed
    and from step `reuse_from_step` on; otherwise it runs. `width_bias` is added to the logits of narrower MLP widths.

    Rule `residual_cache`: all blocks after the first re-use their residuals while the first block's residual moved by
    less than `residual_threshold` since the last computed step, at most `max_reuses` times.

    Both: the first `protected_first` and last `protected_last` steps run every block in full.
    """

    skip_threshold: float = 0.0
    reuse_band: float = 0.0
    max_reuses: int = 0
    reuse_from_step: int = 0
    width_bias: float = 0.0
    residual_threshold: float = 0.0
    protected_first: int = 0
    protected_last: int = 0


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One measured point of a calibration curve.

    `compute_ratio` is the mean share of dense block compute, `relative_seconds` denoise time over dense time, `quality`
    the mean similarity to the exact result, all over the calibration set. `preset` names the point, if it has a name.
    """

    rule: str
    policy: Policy
    compute_ratio: float
    relative_seconds: float
    quality: float
    preset: Preset | None = None


EXACT = CurvePoint("dense", Policy(), 1.0, 1.0, 1.0, Preset.EXACT)


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


def basics_of(card: ModelCard) -> dict[str, Any]:
    """The fields that every card has."""
    return {field.name: getattr(card, field.name) for field in fields(ModelCard)}
