from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from models.elastic.width import narrowed
from models.errors import WeightsError
from models.families.hunyuan3d.plain_dit import (
    CrossAttention,
    HunYuanDiTBlock,
    HunYuanDiTPlain,
    MixtureOfExperts,
    SelfAttention,
)

M = TypeVar("M", bound=nn.Module)

SIZES: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 32,
    "context_dim": 12,
    "depth": 4,
    "num_heads": 2,
    "qk_norm": True,
    "qkv_bias": False,
    "num_moe_layers": 2,
    "num_experts": 4,
    "moe_top_k": 2,
}


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def model(rng: torch.Generator) -> HunYuanDiTPlain:
    return randomised(HunYuanDiTPlain(**SIZES), rng)


@pytest.fixture
def inputs(rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows: latents, times and images."""
    return (
        torch.randn(2, 6, 4, generator=rng),
        torch.rand(2, generator=rng),
        torch.randn(2, 5, 12, generator=rng),
    )


def randomised(module: M, rng: torch.Generator) -> M:
    """All parameters random, norms and biases too, so that a forgotten one shows."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=rng)
    return module.eval().requires_grad_(False)


def test_order_of_latents_carries_no_information(
    model: HunYuanDiTPlain, inputs: tuple[Tensor, Tensor, Tensor], rng: torch.Generator
) -> None:
    latents, timestep, context = inputs
    order = torch.randperm(latents.shape[1], generator=rng)
    torch.testing.assert_close(
        model(latents[:, order], timestep, context), model(latents, timestep, context)[:, order], atol=1e-5, rtol=0
    )


def test_row_alone_gives_what_it_gives_in_a_batch(
    model: HunYuanDiTPlain, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    together = model(*inputs)
    for i in range(2):
        torch.testing.assert_close(model(*(part[i : i + 1] for part in inputs)), together[i : i + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_no_context_is_a_context_of_zeros(
    qkv_bias: bool, inputs: tuple[Tensor, Tensor, Tensor], rng: torch.Generator
) -> None:
    model = randomised(HunYuanDiTPlain(**SIZES | {"qkv_bias": qkv_bias}), rng)
    latents, timestep, context = inputs
    torch.testing.assert_close(
        model(latents, timestep, None), model(latents, timestep, torch.zeros_like(context)), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("depth", "sources"),
    [(4, [None, None, None, 1]), (5, [None, None, None, 1, 0]), (6, [None, None, None, None, 2, 1])],
)
def test_readers_take_what_was_stored_last_first(depth: int, sources: list[int | None]) -> None:
    model = HunYuanDiTPlain(**SIZES | {"depth": depth})
    assert [model.skip_source(i) for i in range(depth)] == sources
    assert [hasattr(block, "skip_linear") for block in model.blocks] == [source is not None for source in sources]


def test_left_out_source_hands_its_reader_what_it_was_given(
    model: HunYuanDiTPlain, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Block 3 reads block 1, which then stands for block 0."""
    latents, timestep, context = inputs
    blocks: Any = model.blocks
    first = blocks[0](model.embed(latents, timestep), context)
    last = blocks[3](blocks[3].fuse(blocks[2](first, context), first), context)
    assert torch.equal(model(*inputs, left_out={1}), model.final_layer(last))


def test_heads_of_self_attention_are_cut_from_the_joint_projection(rng: torch.Generator) -> None:
    """Three heads of two channels: the first takes its query, key and value from `to_q` alone."""
    attention = randomised(SelfAttention(6, 3, None, False), rng)
    hidden_states = torch.randn(1, 4, 6, generator=rng)
    joint = torch.cat([hidden_states @ getattr(attention, name).weight.T for name in ("to_q", "to_k", "to_v")], dim=-1)
    heads = []
    for head in range(3):
        query, key, value = joint[..., 6 * head : 6 * head + 6].split(2, dim=-1)
        heads.append((query @ key.mT / 2**0.5).softmax(dim=-1) @ value)
    torch.testing.assert_close(attention(hidden_states), attention.out_proj(torch.cat(heads, dim=-1)))


def test_keys_and_values_of_cross_attention_are_cut_in_pairs(rng: torch.Generator) -> None:
    attention = randomised(CrossAttention(6, 5, 3, None, False), rng)
    hidden_states, context = torch.randn(1, 4, 6, generator=rng), torch.randn(1, 7, 5, generator=rng)
    query = attention.to_q(hidden_states)
    joint = torch.cat((attention.to_k(context), attention.to_v(context)), dim=-1)
    heads = []
    for head in range(3):
        key, value = joint[..., 4 * head : 4 * head + 4].split(2, dim=-1)
        scores = query[..., 2 * head : 2 * head + 2] @ key.mT / 2**0.5
        heads.append(scores.softmax(dim=-1) @ value)
    torch.testing.assert_close(attention(hidden_states, context), attention.out_proj(torch.cat(heads, dim=-1)))


def slow_mixture(moe: MixtureOfExperts, hidden_states: Tensor) -> Tensor:
    """Every expert for every token, and a mask."""
    probs = moe.gate(hidden_states).softmax(dim=-1)
    worst_taken = probs.sort(dim=-1, descending=True).values[..., moe.top_k - 1 : moe.top_k]
    weights = probs * (probs >= worst_taken)
    results = torch.stack([expert(hidden_states) for expert in moe.experts], dim=-1)
    return moe.shared_experts(hidden_states) + (results * weights[..., None, :]).sum(dim=-1)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mixture_adds_the_best_experts_by_their_probabilities(top_k: int, rng: torch.Generator) -> None:
    moe = randomised(MixtureOfExperts(8, 5, top_k), rng)
    hidden_states = torch.randn(2, 7, 8, generator=rng)
    torch.testing.assert_close(moe(hidden_states), slow_mixture(moe, hidden_states))


def test_experts_that_no_token_chose_are_not_called(rng: torch.Generator) -> None:
    moe = randomised(MixtureOfExperts(8, 5, 2), rng)
    called = []
    for i, expert in enumerate(moe.experts):
        expert.register_forward_hook(lambda _module, inputs, _output, i=i: called.append((i, len(inputs[0]))))
    token = torch.randn(1, 1, 8, generator=rng)
    moe(token.expand(3, 4, 8))
    _, chosen = moe.route(token)
    assert called == [(i, 12) for i in sorted(chosen.flatten().tolist())]


def test_mixture_learns_as_if_every_expert_saw_every_token(rng: torch.Generator) -> None:
    moe = randomised(MixtureOfExperts(8, 5, 2), rng).requires_grad_()
    hidden_states = torch.randn(2, 7, 8, generator=rng, requires_grad=True)
    cotangent = torch.randn(2, 7, 8, generator=rng)
    learned = (hidden_states, moe.gate.weight, *moe.shared_experts.parameters(), *moe.experts.parameters())
    # No gradient of an expert that no token chose is one of zeros.
    fast = torch.autograd.grad(moe(hidden_states), learned, cotangent, materialize_grads=True)
    slow = torch.autograd.grad(slow_mixture(moe, hidden_states), learned, cotangent)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    assert all(gradient.abs().max() > 0 for gradient in fast[:2])


def test_pass_and_gradients_under_autocast_are_near_those_in_float32(
    model: HunYuanDiTPlain, inputs: tuple[Tensor, Tensor, Tensor]
) -> None:
    model.requires_grad_()
    names = ("t_embedder.mlp.0.weight", "x_embedder.weight", "final_layer.linear.bias")
    learned = [model.get_parameter(name) for name in names]

    def run() -> tuple[Tensor, ...]:
        velocity = model(*inputs)
        return velocity, *torch.autograd.grad(velocity.float().square().mean(), learned)

    exact = run()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = run()
    for value, expected in zip(rounded, exact, strict=True):
        assert (value - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_model_in_half_precision_answers_in_it(
    model: HunYuanDiTPlain, inputs: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    latents, timestep, context = inputs
    expected = model(*inputs)
    velocity = model.to(dtype)(latents.to(dtype), timestep, context.to(dtype))
    assert velocity.dtype == dtype
    assert (velocity.float() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("index", [0, 3])
def test_narrow_block_is_the_one_whose_other_neurons_are_silent(
    model: HunYuanDiTPlain, inputs: tuple[Tensor, Tensor, Tensor], index: int
) -> None:
    latents, timestep, context = inputs
    block, width = model.blocks[index], 80
    assert isinstance(block, HunYuanDiTBlock)
    layers = {name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    first = {name for name in layers if name.endswith(("fc1", "net.0.proj"))}
    last = {name for name in layers if name.endswith(("fc2", "net.2"))}
    assert len(first) == len(last) == (1 if index == 0 else 5)
    narrow = narrowed(block, dict.fromkeys(first, width), dict.fromkeys(last, width))
    hidden_states = model.embed(latents, timestep)
    result = narrow(hidden_states, context)
    assert not torch.allclose(result, block(hidden_states, context))
    for name in last:
        block.get_parameter(f"{name}.weight")[:, width:] = 0
    torch.testing.assert_close(result, block(hidden_states, context))


def test_layer_norm_of_heads_has_its_tensors(inputs: tuple[Tensor, Tensor, Tensor], rng: torch.Generator) -> None:
    model = randomised(HunYuanDiTPlain(**SIZES | {"qk_norm_type": "layer"}), rng)
    assert "blocks.0.attn1.q_norm.bias" in model.state_dict()
    assert model(*inputs).isfinite().all()


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"with_decoupled_ca": True}, "with_decoupled_ca"),
        ({"use_attention_pooling": True}, "use_attention_pooling"),
        ({"use_pos_emb": True}, "use_pos_emb"),
        ({"guidance_cond_proj_dim": 256}, "guidance_cond_proj_dim"),
        ({"norm_type": "rms"}, "norm_type rms"),
        ({"qk_norm_type": "batch"}, "qk_norm_type batch"),
        ({"num_heads": 3}, "hidden_size 32 is not a multiple of num_heads 3"),
    ],
)
def test_unsupported_setting_is_named(setting: dict[str, Any], named: str) -> None:
    with pytest.raises(WeightsError, match=named):
        HunYuanDiTPlain(**SIZES | setting)


def test_public_configuration_has_as_many_parameters_as_the_public_checkpoint() -> None:
    with torch.device("meta"):
        model = HunYuanDiTPlain(
            in_channels=64,
            hidden_size=2048,
            context_dim=1024,
            depth=21,
            num_heads=16,
            qk_norm=True,
            qk_norm_type="rms",
            qkv_bias=False,
            num_moe_layers=6,
            num_experts=8,
            moe_top_k=2,
        )
    state = model.state_dict()
    assert len(state) == 752
    assert sum(tensor.numel() for tensor in state.values()) == 3_050_758_720
