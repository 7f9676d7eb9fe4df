"""The cost of a request, predicted from the model's card before any work is done."""

from collections.abc import Sequence
from typing import NamedTuple

from models.card import ImageCard, MeshCard, ModelCard
from models.mesh import size
from models.request import GenerationRequest, ImageRequest, MeshRequest


def predicted_seconds(request: GenerationRequest, card: ModelCard) -> float:
    """Seconds that `request` takes a worker, from its prompt or image to its file, alone on this device.

    `order_seconds` of it is the one prediction that admission counts. `scheduling.pace` corrects it by measured speed.
    """
    decode_s = finish_seconds(request, card) + mesh_decode_seconds(request, card)
    return encode_seconds(request, card) + denoise_seconds(request, card) + decode_s


def order_seconds(requests: Sequence[GenerationRequest], card: ModelCard) -> float:
    """`predicted_seconds` of requests that differ in their seeds alone: their prompt or image is encoded once."""
    return sum(predicted_seconds(request, card) for request in requests) - (len(requests) - 1) * card.encode_seconds


def encode_seconds(request: GenerationRequest, card: ModelCard) -> float:
    """Seconds to encode the prompt or the image of `request`, and the picture that it edits."""
    if isinstance(request, ImageRequest) and isinstance(card, ImageCard) and request.edit:
        return card.encode_seconds + card.picture_seconds * relative_size(request, card)
    return card.encode_seconds


def denoise_seconds(request: GenerationRequest, card: ModelCard) -> float:
    """Seconds to denoise `request` alone on this device.

    Only computed steps take time.
    """
    step_s, num_steps, point = dense_step_seconds(request, card), request.num_steps, request.point
    return point.num_computed_steps(num_steps, request.compute_cap) * point.relative_step_seconds * step_s


def finish_seconds(request: GenerationRequest, card: ModelCard, measured_s: float = 0.0) -> float:
    """Seconds to decode and encode an image; 0 for a mesh.

    `measured_s` is how long it took lately at the model's default size, if that is more than when it was loaded.
    """
    if not isinstance(card, ImageCard):
        return 0.0
    return max(card.decode_seconds, measured_s) * relative_size(request, card)


def mesh_decode_seconds(request: GenerationRequest, card: ModelCard) -> float:
    """Seconds from the last step of a mesh to its file; 0 for an image."""
    if isinstance(request, MeshRequest) and isinstance(card, MeshCard):
        return card.decode_seconds(request.octree_resolution)
    return 0.0


def grid_bytes(request: GenerationRequest) -> int:
    """Bytes that the field of a mesh takes while it is decoded."""
    return size.grid_bytes(request.octree_resolution) if isinstance(request, MeshRequest) else 0


def dense_step_seconds(request: GenerationRequest, card: ModelCard) -> float:
    """Seconds of one step of `request` in which every block runs.

    True classifier-free guidance runs every step on two rows. The card's time was measured at the default guidance.
    """
    call, row = block_seconds(request, card)
    return len(card.blocks) * (call + request.num_branches * row)


class BlockSeconds(NamedTuple):
    """Seconds to run a block in a step: a fixed part for its calls, and a part per row."""

    call: float
    row: float


def block_seconds(request: GenerationRequest, card: ModelCard) -> BlockSeconds:
    """Seconds of a block, the mean over the model's blocks.

    An exact step may be a call for each guidance branch; all others are one call, which requests can share.
    A row's time is taken as proportional to the pixels, pictures beside the noise included. That is too low for very
    large images, whose attention grows with the square.
    """
    block_s = card.dense_step_seconds / len(card.blocks)
    num_rows = 2 if card.is_guided(card.default_guidance_scale) else 1
    row_s = block_s * (1 - card.fixed_share) / num_rows
    if isinstance(request, ImageRequest) and isinstance(card, ImageCard):  # all meshes are denoised at one size
        row_s *= card.relative_size(request)
    num_calls = request.num_branches if request.wants_exact and not card.joins_branches else 1
    return BlockSeconds(num_calls * block_s * card.fixed_share, row_s)


def relative_size(request: GenerationRequest, card: ModelCard) -> float:
    """Pixels of the image relative to the default size; 1 for a mesh."""
    if isinstance(request, ImageRequest) and isinstance(card, ImageCard):
        return request.height * request.width / (card.default_height * card.default_width)
    return 1.0
