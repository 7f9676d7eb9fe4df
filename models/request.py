"""Valid requests: a `GenerationRequest` exists only if its model can serve it."""

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum

from models.curve import CurvePoint, Preset
from models.errors import InvalidRequest

MIN_TARGET_FACES = 100
"""Fewest triangles to ask of a mesh. With fewer a solid keeps little of its form; 4, the fewest that enclose anything,
were seen to be reached."""
_PNG_SIZE_OFFSET = 16
"""Where a PNG file has its width and height (https://www.w3.org/TR/png-3/#11IHDR)."""


@dataclass(frozen=True, slots=True)
class PresetBudget:
    preset: Preset


@dataclass(frozen=True, slots=True)
class QualityBudget:
    """The cheapest point whose calibrated quality is at least `quality`, in [0, 1]; 1 is exact."""

    quality: float


@dataclass(frozen=True, slots=True)
class ComputeBudget:
    """At most this share, in (0, 1], of the dense block compute of the whole generation."""

    compute_ratio: float


@dataclass(frozen=True, slots=True)
class LatencyBudget:
    """The highest quality that is ready `latency_s` seconds after arrival, never below `min_quality`."""

    latency_s: float
    min_quality: float = 0.0


Budget = PresetBudget | QualityBudget | ComputeBudget | LatencyBudget


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest(ABC):
    """One result to generate. A call for `n` images becomes `n` requests with consecutive seeds.

    `budget` is what the client asked for, `point` the place on the model's curve that it was resolved to. `is_guided`
    says whether true classifier-free guidance is on. `wants_trace` keeps every block's decision for the receipt.
    """

    model: str
    num_inference_steps: int
    guidance_scale: float
    seed: int
    budget: Budget
    point: CurvePoint
    is_guided: bool
    wants_trace: bool = False

    @property
    @abstractmethod
    def size(self) -> str:
        """What its memory depends on, for messages."""

    @property
    def num_branches(self) -> int:
        """Rows of every step: guidance runs it with and without the prompt or the image."""
        return 2 if self.is_guided else 1

    @property
    def wants_exact(self) -> bool:
        """Whether the result is to be that of the unmodified pipeline, bit for bit.

        With a deadline it is not, even where there is time for everything: then steps are shared with others.
        """
        return self.point.is_exact and not isinstance(self.budget, LatencyBudget)

    @property
    def compute_cap(self) -> float | None:
        """The share of the dense compute that the whole generation may use, None if there is no cap."""
        return self.budget.compute_ratio if isinstance(self.budget, ComputeBudget) else None

    @property
    def num_steps(self) -> int:
        """Denoise steps that are taken, computed or forecast. An edit takes the last of its schedule only."""
        return self.num_inference_steps

    @property
    def num_computed_steps(self) -> int:
        """Denoise steps that are expected to be computed; the others are forecast. A deadline may change it."""
        return self.point.num_computed_steps(self.num_steps, self.compute_cap)


def steps_of_strength(num_inference_steps: int, strength: float) -> int:
    """How many steps of the schedule, the last ones, an edit of this strength takes: its share of them, rounded up.

    Computed as in `get_timesteps` of diffusers' pipelines, so that rounding is the same. Raises InvalidRequest if it
    is none.
    """
    wanted = min(num_inference_steps * strength, num_inference_steps)
    taken = num_inference_steps - int(max(num_inference_steps - wanted, 0))
    if taken < 1:
        raise InvalidRequest(
            f"strength {strength:g} takes none of the {num_inference_steps} denoise steps; the smallest strength that "
            f"takes one is above 0; try {1 / num_inference_steps:.2g}",
            "strength",
        )
    return taken


def size_of_png(file: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the head of a PNG file."""
    width, height = struct.unpack_from(">II", file, _PNG_SIZE_OFFSET)
    return width, height


def head_of_png(width: int, height: int) -> bytes:
    """The head of a PNG file of this size, for predictions that need no pixels."""
    return bytes(_PNG_SIZE_OFFSET) + struct.pack(">II", width, height)


@dataclass(frozen=True, slots=True)
class ImageEdit:
    """What an image is made from, besides its prompt.

    `images` are checked PNG files: upright, decodable, within the pixel limit. `mask`, such a file too, shows by its
    transparency what may change: pixels with an alpha below 128. All else keeps every pixel. None if all may change.
    `strength`, above 0 and at most 1, is the share of the denoise steps that are taken, from the picture with noise on;
    `steps_of_strength` counts them. None for models that read the pictures beside the noise instead.
    """

    images: tuple[bytes, ...]
    mask: bytes | None = None
    strength: float | None = None

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Widths and heights of the pictures, from the heads of their files."""
        return tuple(map(size_of_png, self.images))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRequest(GenerationRequest):
    """One image to generate from a prompt, and with `edit` from pictures too.

    `height` and `width` are in pixels and fit the model. The scale of true classifier-free guidance is `guidance_scale`
    where the model's `Guidance` is TRUE (`true_cfg_scale` is 1 there), else `true_cfg_scale`. There is a
    `negative_prompt` only where that guidance is on; None stands for an empty one. If `is_transparent`, the object is
    cut out of the finished image.
    """

    prompt: str
    height: int
    width: int
    negative_prompt: str | None = None
    true_cfg_scale: float = 1.0
    edit: ImageEdit | None = None
    is_transparent: bool = False

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def num_steps(self) -> int:
        """As in `GenerationRequest`. Raises what `steps_of_strength` raises."""
        if self.edit is None or self.edit.strength is None:
            return self.num_inference_steps
        return steps_of_strength(self.num_inference_steps, self.edit.strength)


class BackgroundRemoval(StrEnum):
    """Whether the background of the input image is removed."""

    AUTO = "auto"  # if the image has no transparency
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshRequest(GenerationRequest):
    """One mesh to generate from an image.

    `input_image` is a checked image file: upright, decodable, within the pixel limit. If `is_prepared`, it shows what
    the model looks at: the object alone, as `Family.preparation` cuts it out. `octree_resolution` is the number
    of grid cells along each side of the field. `target_faces` is the most triangles the mesh may have, None for no
    reduction.
    """

    input_image: bytes
    octree_resolution: int
    target_faces: int | None = None
    remove_background: BackgroundRemoval = BackgroundRemoval.AUTO
    is_prepared: bool = False

    @property
    def size(self) -> str:
        return f"octree_resolution {self.octree_resolution}"
