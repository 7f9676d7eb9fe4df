"""`hunyuan3d21_dit`: Hunyuan3D-2.1's denoiser: each part, passes without some blocks, and a guided sampling run."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from models.diffusion.sampling import classifier_free_guidance, consistency_schedule, euler_step, rising_flow_schedule
from models.families.hunyuan3d.plain_dit import HunYuanDiTBlock, HunYuanDiTPlain, MixtureOfExperts, time_features

NEAR: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def recording(recorded: Callable[[str], Any]) -> Any:
    return recorded("hunyuan3d21_dit")


@pytest.fixture(scope="module")
def model(recording: Any) -> HunYuanDiTPlain:
    accepted = inspect.signature(HunYuanDiTPlain).parameters
    model = HunYuanDiTPlain(**{key: value for key, value in recording.settings["config"].items() if key in accepted})
    model.load_state_dict(recording.weights)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs(recording: Any) -> tuple[Tensor, Tensor, Tensor]:
    latents, timestep, context = (recording.tensors[f"in/{name}"] for name in ("x", "t", "cond"))
    return latents, timestep, context


@pytest.fixture(scope="module")
def computed(model: HunYuanDiTPlain, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The results of one pass, under the names of the recording."""
    computed: dict[str, Tensor] = {}
    handles = []

    def keep(module: torch.nn.Module, name: str) -> None:
        handles.append(module.register_forward_hook(lambda _module, _inputs, output: computed.update({name: output})))

    def keep_route(module: torch.nn.Module, name: str) -> None:
        def route(moe: torch.nn.Module, moe_inputs: tuple[Tensor], _output: Tensor) -> None:
            assert isinstance(moe, MixtureOfExperts)
            weights, experts = moe.route(moe_inputs[0].flatten(0, -2))
            computed.update({f"{name}_topk_weight": weights, f"{name}_topk_index": experts})

        handles.append(module.register_forward_hook(route))

    keep(model.x_embedder, "x_embed")
    for i, block in enumerate(model.blocks):
        keep(block, f"block.{i}")
        parts = {"skip_norm": "skip", "attn1": "attn1", "attn2": "attn2", "mlp": "ffn", "moe": "ffn"}
        for name, child in block.named_children():
            if name in parts:
                keep(child, f"block.{i}.{parts[name]}")
            if name == "moe":
                keep_route(child, f"block.{i}.gate")
    computed["final"] = model(*inputs)
    for handle in handles:
        handle.remove()
    timestep = inputs[1]
    computed["time_sincos"] = time_features(timestep, model.x_embedder.out_features)
    computed["time_token"] = model.time_token(timestep)[:, None]
    return computed


def test_every_part_of_a_pass_is_as_recorded(recording: Any, computed: dict[str, Tensor]) -> None:
    runs = ("out/skip_identity/", "out/skip_keep_fuse/", "out/sample/")
    parts = {key for key in recording.tensors if key.startswith("out/") and not key.startswith(runs)}
    assert parts == {f"out/{name}" for name in computed}
    for name, value in computed.items():
        expected = recording.tensors[f"out/{name}"]
        torch.testing.assert_close(value, expected, **NEAR, msg=partial("{}: {}".format, name))


def test_pass_without_some_blocks_but_with_their_fuse_is_as_recorded(
    recording: Any, model: HunYuanDiTPlain, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    velocity = model(*inputs, left_out=set(recording.settings["skip_blocks"]))
    torch.testing.assert_close(velocity, recording.tensors["out/skip_keep_fuse/final"], **NEAR)


def test_pass_without_some_blocks_and_their_fuse_is_as_recorded(
    recording: Any, model: HunYuanDiTPlain, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    latents, timestep, context = inputs
    hidden_states = model.embed(latents, timestep)
    outputs: list[Tensor] = []
    for i, block in enumerate(model.blocks):
        assert isinstance(block, HunYuanDiTBlock)
        if i not in recording.settings["skip_blocks"]:
            source = model.skip_source(i)
            if source is not None:
                hidden_states = block.fuse(hidden_states, outputs[source])
            hidden_states = block(hidden_states, context)
        outputs.append(hidden_states)
    velocity = model.final_layer(hidden_states)
    torch.testing.assert_close(velocity, recording.tensors["out/skip_identity/final"], **NEAR)


@pytest.mark.parametrize("uncond_is_none", [True, False])
def test_sampling_run_is_as_recorded(recording: Any, model: HunYuanDiTPlain, uncond_is_none: bool) -> None:
    settings, tensors = recording.settings["sample"], recording.tensors
    steps = settings["num_inference_steps"]
    sigmas = {
        "flow_match": lambda: rising_flow_schedule(steps, settings.get("shift", 1.0)),
        "consistency": lambda: consistency_schedule(steps, settings["pcm_timesteps"]),
    }[settings["scheduler"]]()
    torch.testing.assert_close(1000 * sigmas[:-1], tensors["out/sample/timesteps"], **NEAR)
    latents, context = tensors["in/sample/noise"], tensors["in/sample/cond"]
    for step, sigma in enumerate(sigmas[:-1]):
        timestep = sigma.expand(len(latents))
        uncond = model(latents, timestep, None if uncond_is_none else torch.zeros_like(context))
        velocity = classifier_free_guidance(model(latents, timestep, context), uncond, settings["guidance_scale"])
        latents = euler_step(latents, velocity, sigma, sigmas[step + 1])
        torch.testing.assert_close(latents, tensors[f"out/sample/latents.{step}"], **NEAR)
