"""Other ways to buy speed: fewer steps, second-order solvers, and caches of diffusers and of cache-dit.

Each `attach` function takes a subject and a setting and gives a denoise loop on a model of its own. Settings are as the
authors advise, over the range that is useful on these small models. Caches decide for a whole batch and forget at the
end of a call: the pipelines of diffusers reset them.
"""

import json
import logging
import math
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    MagCacheConfig,
    QwenImagePipeline,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from torch import Tensor

from benchmarks.frontier.subjects import Denoise, ImageSubject, MeshSubject, Prepare

Solver = type[DPMSolverMultistepScheduler] | type[UniPCMultistepScheduler]

_FLOW = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "use_dynamic_shifting": False,
}
_CALIBRATION_PROMPTS = 8
_FIRST_SIGMA = 0.999
"""Where diffusers' solvers begin with flow sigmas: at 1 the logarithm of the signal is infinite."""


def with_steps(prepare: Prepare, num_steps: int) -> Prepare:
    return lambda requests: prepare([replace(request, num_inference_steps=num_steps) for request in requests])


def fewer_steps(subject: ImageSubject | MeshSubject, num_steps: int) -> Prepare:
    """The model's own Euler scheduler with fewer steps."""
    return with_steps(subject.stock(), num_steps)


def solver_steps(subject: ImageSubject | MeshSubject, setting: tuple[Solver, int]) -> Prepare:
    """A multistep solver of diffusers, on the noise levels that the model's own scheduler has for this many steps."""
    solver, num_steps = setting
    if isinstance(subject, MeshSubject):
        return with_steps(_mesh_solver(subject, solver), num_steps)
    pipeline = subject.pipeline()
    euler = pipeline.scheduler
    scheduler = solver.from_config({**euler.config, **_FLOW})

    def set_timesteps(
        num_inference_steps: int | None = None, device: object = None, sigmas: Any = None, mu: float | None = None
    ) -> None:
        """FLUX.1's pipeline gives such a scheduler the number of steps, Qwen-Image's the sigmas."""
        count = num_inference_steps or len(sigmas)
        euler.set_timesteps(sigmas=np.linspace(1, 1 / count, count), mu=mu)
        _set_sigmas(scheduler, euler.sigmas)

    scheduler.set_timesteps = set_timesteps
    pipeline.scheduler = scheduler
    return with_steps(subject.through(pipeline), num_steps)


def _mesh_solver(subject: MeshSubject, solver: Solver) -> Prepare:
    """The solver on Hunyuan3D's times, which run from 0 (noise) to 1: sigma is 1 - time, and velocity is reversed."""

    def prepare(requests: Sequence[Any]) -> Denoise:
        times = subject.checkpoint.schedule(requests[0].num_inference_steps)[:-1]  # the last step has no length
        scheduler = solver(**_FLOW)
        _set_sigmas(scheduler, 1 - times)

        def step(velocity: Tensor, latents: Tensor, index: int) -> Tensor:
            result: Tensor = scheduler.step(-velocity, scheduler.timesteps[index], latents).prev_sample
            return result

        return subject.loop(requests, step)

    return prepare


def _set_sigmas(scheduler: Any, sigmas: Tensor) -> None:
    """Begin a run over these noise levels, `(steps + 1,)` from 1 to 0."""
    type(scheduler).set_timesteps(scheduler, len(sigmas) - 1)
    scheduler.sigmas = sigmas.clamp(max=_FIRST_SIGMA)
    scheduler.timesteps = 1000 * sigmas[:-1]
    scheduler.set_begin_index(0)


def first_block_cache(subject: ImageSubject, threshold: float) -> Prepare:
    return _cached(subject, FirstBlockCacheConfig(threshold=threshold))


def taylorseer(subject: ImageSubject, setting: tuple[bool, int, int]) -> Prepare:
    """Setting: lite mode (the last layer alone is forecast, else every attention), interval, order."""
    is_lite, interval, order = setting
    config = TaylorSeerCacheConfig(
        cache_interval=interval, max_order=order, use_lite_mode=is_lite, taylor_factors_dtype=torch.float32
    )
    return _cached(subject, config)


def mag_cache(subject: ImageSubject, setting: tuple[float, int, float]) -> Prepare:
    """Setting: threshold, most steps skipped in a row, share of first steps that always run."""
    threshold, max_skip_steps, retention_ratio = setting
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=max_skip_steps,
        retention_ratio=retention_ratio,
        num_inference_steps=subject.card.default_num_inference_steps,
        mag_ratios=_mag_ratios(subject),
    )
    return _cached(subject, config)


@cache
def _mag_ratios(subject: ImageSubject) -> Tensor:
    """MagCache's calibration: it prints the ratios of a run, with guidance one list per branch. Their mean is taken."""
    requests = subject.calibration_requests(_CALIBRATION_PROMPTS)
    num_steps = requests[0].num_inference_steps
    printed = StringIO()
    with redirect_stdout(printed):
        _cached(subject, MagCacheConfig(num_inference_steps=num_steps, calibrate=True))(requests)()
    return torch.tensor([json.loads(ratios) for ratios in re.findall(r"\[[\d., e+-]+\]", printed.getvalue())]).mean(0)


def sea_cache(subject: ImageSubject, setting: tuple[float, int]) -> Prepare:
    """SeaCache, with what diffusers' pipelines for images do not tell it: the latents, and where the loop is.

    Setting: threshold, most re-uses in a row.
    """
    threshold, max_reuses = setting
    pipeline = subject.pipeline()
    transformer = pipeline.transformer
    plain_context = transformer.cache_context

    def context_with_schedule(name: str) -> Any:
        scheduler = pipeline.scheduler
        index = scheduler.step_index or 0  # None before the first step
        schedule = {"sigma": scheduler.sigmas[index].item(), "num_inference_steps": len(scheduler.timesteps)}
        return plain_context(name, step_index=index, **schedule)

    transformer.cache_context = context_with_schedule
    # The exponent of images' spectra; diffusers' default of 3 is that of videos.
    config = SeaCacheConfig(
        threshold=threshold,
        max_consecutive_cached=max_reuses,
        power_exp=2.0,
        raw_vision_callback=_square_latents,
    )
    transformer.enable_cache(config)
    return subject.through(pipeline)


def _square_latents(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The packed latents of square images, each `(channels, 1, rows, columns)`."""
    latents: Tensor = kwargs["hidden_states"]
    side = math.isqrt(latents.shape[1])
    return [*latents.unflatten(1, (side, side)).permute(0, 3, 1, 2)[:, :, None]]


def dbcache(subject: ImageSubject, setting: tuple[float, int, int]) -> Prepare:
    """DBCache of cache-dit. Setting: threshold, most re-uses in a row, order of TaylorSeer (0 for none).

    One block is always computed, and four steps warm up, as cache-dit advises where there are few steps.
    """
    import cache_dit  # replaces parts of diffusers, so that other contenders would not run as published

    logging.disable(logging.INFO)  # it says much about each pipeline, past the levels of its loggers' parents
    threshold, max_reuses, order = setting
    pipeline = subject.pipeline()
    # cache-dit changes the pipeline's class. A class of its own leaves the stock pipeline and other settings alone.
    pipeline.__class__ = type(type(pipeline).__name__, (type(pipeline),), {})
    cache_dit.enable_cache(
        pipeline,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            max_warmup_steps=4,
            max_continuous_cached_steps=max_reuses,
            residual_diff_threshold=threshold,
            # Qwen-Image's pipeline calls its transformer twice per step, FLUX.1's once.
            enable_separate_cfg=isinstance(pipeline, QwenImagePipeline),
        ),
        calibrator_config=cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None,
    )
    return subject.through(pipeline)


def _cached(subject: ImageSubject, config: Any) -> Prepare:
    pipeline: DiffusionPipeline = subject.pipeline()
    pipeline.transformer.enable_cache(config)
    return subject.through(pipeline)
