"""Encodes a result as an artifact: the file of an image or a mesh."""

import json

import numpy as np
from numpy.typing import NDArray

from models.file_formats import MeshFormat, OutputFormat, encode_image
from models.mesh.cleanup import CleanMesh
from models.mesh.formats import encode_mesh
from models.request import (
    Budget,
    ComputeBudget,
    GenerationRequest,
    ImageRequest,
    LatencyBudget,
    PresetBudget,
    QualityBudget,
)
from service.order import Output


def encode_output(result: NDArray[np.uint8] | CleanMesh, request: GenerationRequest, output: Output) -> bytes:
    if isinstance(result, CleanMesh):
        assert isinstance(output.format, MeshFormat)
        return encode_mesh(result.mesh, output.format)
    assert isinstance(request, ImageRequest)
    assert isinstance(output.format, OutputFormat)
    metadata = image_metadata(request) if output.has_metadata else None
    return encode_image(result, output.format, metadata=metadata, quality=output.compression_quality)


def image_metadata(request: ImageRequest) -> dict[str, str]:
    """Metadata of an image file, from which the image can be requested again."""
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
        case LatencyBudget(latency_s, min_quality):
            return {"latency_ms": round(latency_s * 1000, 3), "min_quality": min_quality}
