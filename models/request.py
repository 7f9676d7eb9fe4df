"""What a client asked for, checked: the existence of a `GenerationRequest` means that it can be served."""

from dataclasses import dataclass
from enum import StrEnum


class Preset(StrEnum):
    """Named points of a calibration curve, from the unmodified pipeline to the fastest."""

    EXACT = "exact"
    HIGH = "high"
    BALANCED = "balanced"
    FAST = "fast"
    DRAFT = "draft"


@dataclass(frozen=True, slots=True)
class PresetBudget:
    preset: Preset


@dataclass(frozen=True, slots=True)
class QualityBudget:
    """The cheapest point whose calibrated quality is at least `quality`, in [0, 1]; 1 is exact."""

    quality: float


@dataclass(frozen=True, slots=True)
class ComputeBudget:
    """At most this share, in (0, 1], of the dense block compute over the whole generation."""

    compute_ratio: float


Budget = PresetBudget | QualityBudget | ComputeBudget


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One picture to make. A client's `n` pictures are `n` requests with consecutive seeds.

    `height` and `width` are in pixels and fit the model. True classifier-free guidance is on above a scale of 1, which
    is `guidance_scale` where the model's `Guidance` is TRUE (`true_cfg_scale` is 1 there, and without a
    `negative_prompt` the negative prompt is empty), else `true_cfg_scale`, which never comes without a
    `negative_prompt`. Where it is off there is no `negative_prompt`. `wants_trace` keeps every block's decision for the
    receipt.
    """

    model: str
    prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    budget: Budget
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    wants_trace: bool = False
