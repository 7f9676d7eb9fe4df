"""Euler sampling, for the samples drawn during training."""

from itertools import pairwise

import torch
from torch import Tensor

from training.backbone import Backbone, run_all
from training.lesson import Condition


@torch.no_grad()
def sample(
    backbone: Backbone,
    condition: Condition,
    no_condition: Condition | None,
    shape: tuple[int, int],
    *,
    guidance_scale: float,
    num_steps: int = 20,
    seed: int = 0,
) -> Tensor:
    """Sample latents `(batch, *shape)`; `shape` is (tokens, channels).

    Guidance is classifier-free with `no_condition`, else an input of the transformer.
    """
    batch = len(condition.embeds)
    latents = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))
    sigmas = torch.linspace(1, 0, num_steps + 1)
    guidance = torch.full((batch,), 1.0 if no_condition else guidance_scale)

    def predict(given: Condition, sigma: Tensor) -> Tensor:
        return run_all(backbone, backbone.prologue(latents, sigma.expand(batch), guidance, given))

    for sigma, next_sigma in pairwise(sigmas):
        velocity = predict(condition, sigma)
        if no_condition:
            unconditional = predict(no_condition.repeat(batch), sigma)
            velocity = unconditional + guidance_scale * (velocity - unconditional)
        latents = latents + (next_sigma - sigma) * velocity
    return latents
