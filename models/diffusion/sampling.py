"""The flow-matching sampler and guidance, as plain functions."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor


def flow_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler, num_inference_steps: int, num_image_tokens: int
) -> tuple[Tensor, Tensor]:
    """Noise levels `(steps + 1,)`, descending to 0, and model times `(steps,)` in [0, 1000], float32 on the CPU.

    The schedule of diffusers' FLUX and Qwen-Image pipelines: even levels from 1 to 1 / steps, shifted as configured in
    the checkpoint's scheduler. A dynamic shift depends on the number of image tokens.
    """
    config = scheduler.config
    mu = calculate_shift(
        num_image_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    levels = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    with np.errstate(invalid="ignore"):
        scheduler.set_timesteps(sigmas=levels, mu=mu, device="cpu")
    if num_inference_steps == 1:
        # diffusers stretches levels to end at `shift_terminal`, and the only one by 0 / 0.
        scheduler.sigmas, scheduler.timesteps = (
            torch.tensor([1.0, 0.0]),
            torch.tensor([float(config.num_train_timesteps)]),
        )
    return scheduler.sigmas, scheduler.timesteps


def rising_flow_schedule(num_inference_steps: int, shift: float = 1.0) -> Tensor:
    """Times `(steps + 1,)` from 0 (noise) to 1 (data), float32 on the CPU. The model takes these times, too.

    Hunyuan3D's schedule, whose path runs against the usual direction. The even times reach 1 one step early, so the
    last step has length 0. The public checkpoints count it as a step (Hunyuan3D-2.1 at 5e3ec6d, `hy3dshape`).
    """
    times = np.linspace(0.0, 1.0, num_inference_steps)
    shifted = shift * times / (1 + (shift - 1) * times)
    return torch.from_numpy(np.append(shifted, 1.0)).float()


def consistency_schedule(num_inference_steps: int, pcm_timesteps: int) -> Tensor:
    """Times `(steps + 1,)` from 0 to 1 as in `rising_flow_schedule`, chosen from the times a model was distilled for.

    Hunyuan3D's turbo checkpoints are distilled for `pcm_timesteps` of 1000 times (Wang et al. 2024, "Phased Consistency
    Models", https://arxiv.org/abs/2405.18407). At most that many steps have a length above 0.
    """
    known = np.maximum(np.arange(pcm_timesteps) * (1000 // pcm_timesteps) - 1, 0)
    chosen = known[np.arange(num_inference_steps) * pcm_timesteps // num_inference_steps]
    return torch.from_numpy(np.append(np.linspace(0.0, 1.0, 1000)[chosen], 1.0)).float()


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Latents at a noise level, in their type, as `scale_noise` of FlowMatchEulerDiscreteScheduler computes them.

    `sigma` is a single number on the CPU.
    """
    sigma = sigma.to(latents.dtype)
    return sigma * noise + (1.0 - sigma) * latents


def euler_step(latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """One step along the velocity, in float32 for every type of model, as in FlowMatchEulerDiscreteScheduler."""
    return (latents.float() + (next_sigma - sigma) * velocity).to(velocity.dtype)


def linear_step(latents: Tensor, growth: float, weights: Sequence[float], velocities: Sequence[Tensor]) -> Tensor:
    """One step along weighted velocities, in float32 as `euler_step`. The latents grow by the share `growth`."""
    result = latents.float() * (1 + growth)
    for weight, velocity in zip(weights, velocities, strict=True):
        result = result.add(velocity, alpha=weight)
    return result.to(velocities[0].dtype)


def classifier_free_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Ho & Salimans 2022, https://arxiv.org/abs/2207.12598."""
    return uncond + scale * (cond - uncond)


def rescale_to_norm(guided: Tensor, cond: Tensor) -> Tensor:
    """Give every token of a guided velocity `(batch, tokens, channels)` the norm of the conditional prediction.

    diffusers' Qwen-Image pipeline does this after guidance. The official Elastic-DiT program does not.
    """
    ratio: Tensor = torch.norm(cond, dim=-1, keepdim=True) / torch.norm(guided, dim=-1, keepdim=True)
    return guided * ratio
