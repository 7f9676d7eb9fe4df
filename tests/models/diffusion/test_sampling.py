from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from models.diffusion.sampling import (
    classifier_free_guidance,
    consistency_schedule,
    euler_step,
    flow_schedule,
    rising_flow_schedule,
)


@pytest.fixture(params=[True, False], ids=["dev", "schnell"])
def scheduler(request: pytest.FixtureRequest) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=request.param)


@pytest.mark.parametrize(("steps", "tokens"), [(1, 16), (4, 64), (28, 4096)])
def test_schedule_is_that_of_the_stock_pipeline(
    scheduler: FlowMatchEulerDiscreteScheduler, steps: int, tokens: int
) -> None:
    sigmas, timesteps = flow_schedule(scheduler, steps, tokens)
    other = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    expected, _ = retrieve_timesteps(
        other, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps).tolist(), mu=calculate_shift(tokens)
    )
    assert torch.equal(timesteps, expected)
    assert torch.equal(sigmas, other.sigmas)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert (sigmas.dtype, timesteps.dtype) == (torch.float32, torch.float32)


def test_schedules_share_no_memory(scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    """The scheduler is a calculator that all requests use; a second one must not move the first one's levels."""
    sigmas, timesteps = flow_schedule(scheduler, 4, 64)
    before = sigmas.clone(), timesteps.clone()
    flow_schedule(scheduler, 4, 1024)
    assert torch.equal(sigmas, before[0])
    assert torch.equal(timesteps, before[1])


@pytest.mark.parametrize("shift_terminal", [None, 0.02])
def test_one_step_goes_from_noise_to_the_image(shift_terminal: float | None) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=shift_terminal)
    sigmas, timesteps = flow_schedule(scheduler, 1, 64)
    assert sigmas.tolist() == [1.0, 0.0]
    assert timesteps.tolist() == [1000.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_euler_step_equals_the_scheduler_bit_for_bit(
    scheduler: FlowMatchEulerDiscreteScheduler, dtype: torch.dtype
) -> None:
    sigmas, timesteps = flow_schedule(scheduler, 5, 64)
    rng = torch.Generator().manual_seed(0)
    ours = stock = torch.randn(2, 8, 4, generator=rng).to(dtype)
    for step, timestep in enumerate(timesteps):
        velocity = torch.randn(2, 8, 4, generator=rng).to(dtype)
        ours = euler_step(ours, velocity, sigmas[step], sigmas[step + 1])
        stock = scheduler.step(velocity, timestep, stock, return_dict=False)[0]
        assert ours.dtype == dtype
        assert torch.equal(ours, stock)


def test_guidance_goes_from_the_negative_prompt_through_the_positive_one() -> None:
    cond, uncond = torch.tensor([2.0]), torch.tensor([1.0])
    assert [classifier_free_guidance(cond, uncond, scale).item() for scale in (0, 1, 3.5)] == [1, 2, 4.5]


@pytest.mark.parametrize(("steps", "expected"), [(1, [0, 1]), (2, [0, 1, 1]), (5, [0, 0.25, 0.5, 0.75, 1, 1])])
def test_rising_schedule_is_even_and_its_last_step_has_no_length(steps: int, expected: list[float]) -> None:
    sigmas = rising_flow_schedule(steps)
    torch.testing.assert_close(sigmas, torch.tensor(expected, dtype=torch.float32))


def test_shift_keeps_a_rising_schedule_longer_near_data() -> None:
    torch.testing.assert_close(rising_flow_schedule(5, 3.0), torch.tensor([0, 0.5, 0.75, 0.9, 1, 1]))


def test_rising_schedule_leads_from_noise_to_data() -> None:
    """Along the exact velocity, with the same step as for falling levels."""
    noise, data = torch.zeros(1, 2), torch.ones(1, 2)
    sigmas = rising_flow_schedule(7)
    latents = noise
    for sigma, next_sigma in pairwise(sigmas):
        latents = euler_step(latents, data - noise, sigma, next_sigma)
    torch.testing.assert_close(latents, data)


def test_consistency_schedule_takes_evenly_from_the_known_times() -> None:
    """The five steps that the public turbo checkpoints are used with."""
    sigmas = consistency_schedule(5, 100)
    expected = torch.tensor([0, 0.199199, 0.399399, 0.599600, 0.799800, 1])
    torch.testing.assert_close(sigmas, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("steps", "known"), [(1, 100), (3, 50), (7, 100), (50, 50)])
def test_consistency_schedule_has_no_step_without_length(steps: int, known: int) -> None:
    sigmas = consistency_schedule(steps, known)
    assert (sigmas.shape, sigmas.dtype) == ((steps + 1,), torch.float32)
    assert (sigmas[0].item(), sigmas[-1].item()) == (0, 1)
    assert (sigmas.diff() > 0).all()
