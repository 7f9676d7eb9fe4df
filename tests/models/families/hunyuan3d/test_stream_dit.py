from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.elastic.width import narrowed
from models.errors import WeightsError
from models.families.hunyuan3d.stream_dit import Hunyuan3DDiT

SIZES: dict[str, Any] = {
    "in_channels": 4,
    "context_in_dim": 12,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "qkv_bias": True,
}

PUBLIC: dict[str, Any] = {
    "in_channels": 64,
    "context_in_dim": 1536,
    "hidden_size": 1024,
    "mlp_ratio": 4.0,
    "num_heads": 16,
    "depth": 16,
    "depth_single_blocks": 32,
    "qkv_bias": True,
}


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def build(rng: torch.Generator) -> Any:
    def build(**settings: Any) -> Hunyuan3DDiT:
        """All parameters random, norms and biases too, so that a forgotten one shows."""
        model = Hunyuan3DDiT(**SIZES | settings)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2, generator=rng)
        return model.eval().requires_grad_(False)

    return build


@pytest.fixture
def model(build: Any) -> Hunyuan3DDiT:
    built: Hunyuan3DDiT = build()
    return built


@pytest.fixture
def inputs(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows: latents, times and images."""
    return (
        torch.randn(2, 6, 4, generator=rng),
        torch.rand(2, generator=rng),
        torch.randn(2, 5, 12, generator=rng),
    )


def test_order_of_latents_carries_no_information(
    model: Hunyuan3DDiT, inputs: tuple[Tensor, Tensor, Tensor], rng: torch.Generator
) -> None:
    latents, timestep, context = inputs
    order = torch.randperm(latents.shape[1], generator=rng)
    torch.testing.assert_close(
        model(latents[:, order], timestep, context), model(latents, timestep, context)[:, order], atol=1e-5, rtol=0
    )


def test_row_alone_gives_what_it_gives_in_a_batch(model: Hunyuan3DDiT, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    together = model(*inputs)
    for i in range(2):
        torch.testing.assert_close(model(*(part[i : i + 1] for part in inputs)), together[i : i + 1], atol=1e-5, rtol=0)


def test_embedded_guidance_moves_the_velocity(build: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    model = build(guidance_embed=True)
    weak, strong = (model(*inputs, torch.full((2,), scale)) for scale in (1.0, 5.0))
    assert not torch.allclose(weak, strong, atol=1e-3)


@pytest.mark.parametrize("guidance_embed", [True, False])
def test_guidance_is_taken_where_it_is_embedded_and_only_there(
    build: Any, inputs: tuple[Tensor, Tensor, Tensor], guidance_embed: bool
) -> None:
    model = build(guidance_embed=guidance_embed)
    with pytest.raises(AssertionError):
        model(*inputs, None if guidance_embed else torch.ones(2))


def test_narrow_double_block_is_the_one_whose_other_neurons_are_silent(
    model: Hunyuan3DDiT, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    latents, timestep, context = inputs
    block, width = model.double_blocks[0], 80
    narrow = narrowed(block, {"img_mlp.0": width}, {"img_mlp.2": width})
    streams = model.latent_in(latents), model.cond_in(context), model.time_embedding(timestep, None)
    result = narrow(*streams)
    assert not torch.allclose(result[1], block(*streams)[1])
    block.get_parameter("img_mlp.2.weight")[:, width:] = 0
    torch.testing.assert_close(result, block(*streams))


def test_narrow_single_block_is_the_one_whose_other_neurons_are_silent(
    model: Hunyuan3DDiT, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    latents, timestep, context = inputs
    block, width, channels = model.single_blocks[0], 80, SIZES["hidden_size"]
    narrow = narrowed(block, {"linear1": 3 * channels + width}, {"linear2": channels + width})
    streams = model.latent_in(latents), model.cond_in(context), model.time_embedding(timestep, None)
    result = narrow(*streams)
    assert not torch.allclose(result[1], block(*streams)[1])
    block.get_parameter("linear2.weight")[:, channels + width :] = 0
    torch.testing.assert_close(result, block(*streams))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_in_half_precision_answers_in_it(
    build: Any, inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    model, guidance = build(guidance_embed=True), torch.full((2,), 5.0)
    latents, timestep, context = inputs
    expected = model(*inputs, guidance)
    velocity = model.to(dtype)(latents.to(dtype), timestep, context.to(dtype), guidance)
    assert velocity.dtype == dtype
    assert (velocity.float() - expected).norm() < 0.05 * expected.norm()


def test_pass_under_autocast_is_near_that_in_float32(
    model: Hunyuan3DDiT, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(*inputs)
    assert (velocity.float() - expected).norm() < 0.05 * expected.norm()


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(WeightsError, match="hidden_size 32 is not a multiple of num_heads 3"):
        Hunyuan3DDiT(**SIZES | {"num_heads": 3})


@pytest.mark.parametrize(
    ("settings", "num_tensors", "num_parameters"),
    [
        ({}, 652, 1_113_274_432),
        ({"guidance_embed": True}, 656, 1_113_274_432 + 256 * 1024 + 1024 + 1024 * 1024 + 1024),
        ({"depth": 8, "depth_single_blocks": 16}, 332, 559_196_224),
    ],
    ids=["2.0", "turbo", "mini"],
)
def test_public_configuration_has_as_many_parameters_as_the_public_checkpoint(
    settings: dict[str, Any], num_tensors: int, num_parameters: int
) -> None:
    with torch.device("meta"):
        state = Hunyuan3DDiT(**PUBLIC | settings).state_dict()
    assert len(state) == num_tensors
    assert sum(tensor.numel() for tensor in state.values()) == num_parameters
