"""What a request will cost, predicted from the model's card before any work is done."""

from models.budget import resolve
from models.card import ModelCard
from models.request import GenerationRequest


def predicted_seconds(request: GenerationRequest, card: ModelCard) -> float:
    """Denoising time of `request` alone on this device.

    Time grows with the pixels; that is low for very large pictures, whose attention grows with their square. True
    classifier-free guidance runs every step twice.
    """
    pixels = request.height * request.width / (card.default_height * card.default_width)
    branches = 2 if request.true_cfg_scale > 1 else 1
    dense_seconds = card.dense_step_seconds * request.num_inference_steps * pixels * branches
    return dense_seconds * resolve(request.budget, card.curve).relative_seconds
