"""What a request will cost, predicted from the model's card before any work is done."""

from models.budget import resolve
from models.card import Guidance, ModelCard
from models.request import GenerationRequest


def predicted_seconds(request: GenerationRequest, card: ModelCard) -> float:
    """Denoising time of `request` alone on this device.

    Time grows with the pixels; that is low for very large pictures, whose attention grows with their square. It grows
    with the rows too: true classifier-free guidance runs every step on two, and the card's time is of the default.
    """
    pixels = request.height * request.width / (card.default_height * card.default_width)
    is_true = card.guidance is Guidance.TRUE
    rows = _num_rows(request.guidance_scale if is_true else request.true_cfg_scale)
    default_rows = _num_rows(card.default_guidance_scale if is_true else 1.0)
    dense_seconds = card.dense_step_seconds * request.num_inference_steps * pixels * rows / default_rows
    return dense_seconds * resolve(request.budget, card.curve).relative_seconds


def _num_rows(true_guidance_scale: float) -> int:
    return 2 if true_guidance_scale > 1 else 1
