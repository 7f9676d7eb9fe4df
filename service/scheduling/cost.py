"""What a request will cost, predicted from the model's card before any work is done."""

from typing import NamedTuple

from models.budget import fastest_enough
from models.card import ImageCard, ModelCard
from models.request import GenerationRequest, ImageRequest, LatencyBudget


def predicted_seconds(request: GenerationRequest, card: ModelCard) -> float:
    """Denoising time of `request` alone on this device.

    Under a deadline it is that of the best place on the curve that is fast enough.
    """
    dense_s = request.num_inference_steps * dense_step_seconds(request, card)
    if isinstance(request.budget, LatencyBudget):
        share = request.budget.latency_s / dense_s
        return dense_s * fastest_enough(card.curve, request.budget.min_quality, share).relative_seconds
    return dense_s * request.point.relative_seconds


def dense_step_seconds(request: GenerationRequest, card: ModelCard) -> float:
    """Time of one of its steps in which every block runs.

    True classifier-free guidance runs every step on two rows, and the card's time is of the default guidance.
    """
    call, row = block_seconds(request, card)
    return len(card.blocks) * (call + request.num_branches * row)


class BlockSeconds(NamedTuple):
    """What running a block takes: so much a call, and so much for every row in it."""

    call: float
    row: float


def block_seconds(request: GenerationRequest, card: ModelCard) -> BlockSeconds:
    """The mean over the model's blocks.

    A row's time grows with the pixels; that is low for very large pictures, whose attention grows with their square.
    """
    block_s = card.dense_step_seconds / len(card.blocks)
    num_rows = 2 if card.is_guided(card.default_guidance_scale) else 1
    row_s = block_s * (1 - card.call_share) / num_rows
    return BlockSeconds(block_s * card.call_share, row_s * _relative_size(request, card))


def _relative_size(request: GenerationRequest, card: ModelCard) -> float:
    """Pixels over those of the default size; meshes are denoised at one size, whatever grid they are decoded on."""
    if isinstance(request, ImageRequest) and isinstance(card, ImageCard):
        return request.height * request.width / (card.default_height * card.default_width)
    return 1.0
