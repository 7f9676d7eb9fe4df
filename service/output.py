"""From a picture's pixels and request to its file."""

import json

import numpy as np
from numpy.typing import NDArray

from models.artifact import encode_picture
from models.request import Budget, ComputeBudget, GenerationRequest, PresetBudget, QualityBudget
from service.jobs.job import Output


def encode_output(pixels: NDArray[np.uint8], request: GenerationRequest, output: Output) -> bytes:
    metadata = picture_metadata(request) if output.has_metadata else None
    return encode_picture(pixels, output.format, metadata=metadata, quality=output.compression_quality)


def picture_metadata(request: GenerationRequest) -> dict[str, str]:
    """What a picture's file says about how it was made: enough to ask for it again."""
    metadata = {
        "prompt": request.prompt,
        "seed": str(request.seed),
        "model": request.model,
        "budget": json.dumps(_budget_fields(request.budget)),
    }
    if request.negative_prompt is not None:
        metadata["negative_prompt"] = request.negative_prompt
    return metadata


def _budget_fields(budget: Budget) -> dict[str, str | float]:
    match budget:
        case PresetBudget(preset):
            return {"preset": preset}
        case QualityBudget(quality):
            return {"quality": quality}
        case ComputeBudget(compute_ratio):
            return {"compute_ratio": compute_ratio}
