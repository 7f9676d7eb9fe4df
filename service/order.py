"""An order: what one call asks for, parsed. It exists only if it is valid; nothing checks or resolves it again."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from models.curve import CurvePoint
from models.file_formats import MeshFormat, OutputFormat
from models.request import ImageRequest, MeshRequest


class QualityLevel(StrEnum):
    """OpenAI's levels of an image's quality, as its types of answers have them."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    XHIGH = "xhigh"
    MAX = "max"


@dataclass(frozen=True, slots=True)
class Output:
    """How results become files and answers. `compression_quality`, 0 to 100, is of WebP and JPEG only.

    `quality_level` is what was asked for in OpenAI's words; None for a deadline, for meshes and in earlier records.
    """

    format: OutputFormat | MeshFormat = OutputFormat.PNG
    compression_quality: int | None = None
    has_metadata: bool = True
    quality_level: QualityLevel | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """The requests of one call, which differ in their seeds alone.

    `quality_requested` is the quality that the budget names, None if it names none. `min_quality` is how far the server
    may lower the quality under load, None if not at all.
    """

    requests: tuple[ImageRequest | MeshRequest, ...]
    output: Output
    quality_requested: float | None
    min_quality: float | None

    @property
    def point(self) -> CurvePoint:
        """The place on the model's curve that the budget was resolved to."""
        return self.requests[0].point

    @property
    def num_branches(self) -> int:
        """Guidance branches of a step."""
        return self.requests[0].num_branches


def input_image_bytes(requests: Iterable[ImageRequest | MeshRequest]) -> int:
    """The size of the input images of all these requests."""
    return sum(len(request.input_image) for request in requests if isinstance(request, MeshRequest))
