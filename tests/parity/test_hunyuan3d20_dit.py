"""`hunyuan3d20_dit`: Hunyuan3D-2.0's denoiser: each part, passes without some blocks, and a sampling run."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from models.diffusion.sampling import classifier_free_guidance, consistency_schedule, euler_step, rising_flow_schedule
from models.families.hunyuan3d.stream_dit import Hunyuan3DDiT, scalar_features

NEAR: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def recording(recorded: Callable[[str], Any]) -> Any:
    return recorded("hunyuan3d20_dit")


@pytest.fixture(scope="module")
def model(recording: Any) -> Hunyuan3DDiT:
    accepted = inspect.signature(Hunyuan3DDiT).parameters
    model = Hunyuan3DDiT(**{key: value for key, value in recording.settings["config"].items() if key in accepted})
    model.load_state_dict(recording.weights)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs(recording: Any, model: Hunyuan3DDiT) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    latents, timestep, context = (recording.tensors[f"in/{name}"] for name in ("x", "t", "cond"))
    return latents, timestep, context, recording.tensors["in/guidance"] if model.guidance_in else None


@pytest.fixture
def recorded_features(recording: Any, model: Hunyuan3DDiT) -> Iterator[None]:
    """Replaces our sines and cosines with the recorded ones, for tests of one pass.

    Their arguments reach 5000. There, a processor's rounding of exp in the last place moves the model's output by as
    much as the tolerance.
    """

    def features(name: str) -> Callable[..., tuple[Tensor]]:
        return lambda _module, _inputs: (recording.tensors[f"out/{name}_sincos"],)

    embedders = {"time": model.time_in, "guidance": model.guidance_in}
    handles = [
        embedder.in_layer.register_forward_pre_hook(features(name)) for name, embedder in embedders.items() if embedder
    ]
    yield
    for handle in handles:
        handle.remove()


def test_sines_and_cosines_are_as_recorded(
    recording: Any, model: Hunyuan3DDiT, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> None:
    for name, embedder, scalar in (("time", model.time_in, inputs[1]), ("guidance", model.guidance_in, inputs[3])):
        if embedder is not None and scalar is not None:
            # One unit in the last place of a frequency, times its factor.
            atol = NEAR["atol"] + torch.finfo(torch.float32).eps * 1000 * scalar.max().item()
            features = scalar_features(scalar, embedder.max_period)
            torch.testing.assert_close(features, recording.tensors[f"out/{name}_sincos"], atol=atol, rtol=0)


def double_outputs(index: int, output: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {f"double.{index}.txt": output[0], f"double.{index}.img": output[1]}


def single_output(index: int, output: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {f"single.{index}": torch.cat(output, dim=1)}


@pytest.mark.usefixtures("recorded_features")
def test_every_part_of_a_pass_is_as_recorded(
    recording: Any, model: Hunyuan3DDiT, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> None:
    computed: dict[str, Tensor] = {}
    handles = []

    def keep(module: torch.nn.Module, results: Callable[[Any], dict[str, Tensor]]) -> None:
        handles.append(module.register_forward_hook(lambda _module, _inputs, output: computed.update(results(output))))

    keep(model.time_in, lambda output: {"time_mlp": output})
    if model.guidance_in is not None:
        keep(model.guidance_in, lambda output: {"guidance_mlp": output})
    keep(model.latent_in, lambda output: {"latent_in": output})
    keep(model.cond_in, lambda output: {"cond_in": output})
    for i, block in enumerate(model.double_blocks):
        keep(block, partial(double_outputs, i))
    for i, block in enumerate(model.single_blocks):
        keep(block, partial(single_output, i))
    computed["final"] = model(*inputs)
    for handle in handles:
        handle.remove()
    elsewhere = ("out/skip_identity/", "out/sample/", "out/time_sincos", "out/guidance_sincos")
    parts = {key for key in recording.tensors if key.startswith("out/") and not key.startswith(elsewhere)}
    assert parts == {f"out/{name}" for name in computed}
    for name, value in computed.items():
        expected = recording.tensors[f"out/{name}"]
        torch.testing.assert_close(value, expected, **NEAR, msg=partial("{}: {}".format, name))


@pytest.mark.usefixtures("recorded_features")
def test_pass_without_some_blocks_is_as_recorded(
    recording: Any, model: Hunyuan3DDiT, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> None:
    latents, timestep, context, guidance = inputs
    temb = model.time_embedding(timestep, guidance)
    hidden_states, encoder_hidden_states = model.latent_in(latents), model.cond_in(context)
    for kind in ("double", "single"):
        for i, block in enumerate(model.get_submodule(f"{kind}_blocks").children()):
            if i not in recording.settings[f"skip_{kind}_blocks"]:
                encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, temb)
    velocity = model.final_layer(hidden_states, temb)
    torch.testing.assert_close(velocity, recording.tensors["out/skip_identity/final"], **NEAR)


def test_sampling_run_is_as_recorded(recording: Any, model: Hunyuan3DDiT) -> None:
    settings, tensors = recording.settings["sample"], recording.tensors
    steps, scale = settings["num_inference_steps"], settings["guidance_scale"]
    sigmas = {
        "flow_match": lambda: rising_flow_schedule(steps, settings.get("shift", 1.0)),
        "consistency": lambda: consistency_schedule(steps, settings["pcm_timesteps"]),
    }[settings["scheduler"]]()
    torch.testing.assert_close(1000 * sigmas[:-1], tensors["out/sample/timesteps"], **NEAR)
    latents, context = tensors["in/sample/noise"], tensors["in/sample/cond"]
    for step, sigma in enumerate(sigmas[:-1]):
        timestep = sigma.expand(len(latents))
        if model.guidance_in:
            velocity = model(latents, timestep, context, torch.full_like(timestep, scale))
        else:
            cond, uncond = (model(latents, timestep, part) for part in (context, torch.zeros_like(context)))
            velocity = classifier_free_guidance(cond, uncond, scale)
        latents = euler_step(latents, velocity, sigma, sigmas[step + 1])
        torch.testing.assert_close(latents, tensors[f"out/sample/latents.{step}"], **NEAR)
