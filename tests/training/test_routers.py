"""What routers learn must be what serving does with them."""

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from models.card import Policy
from models.elastic.compute import BlockCost
from models.elastic.router import MLP_WIDTHS, RouterStack
from models.elastic.runner import ElasticBlock, Row, Streams, run_block
from models.elastic.width import narrowed
from models.families.flux import adapter
from models.families.flux.pipeline import mlp_layers, permute_neurons
from models.report import Decision
from models.rules import RULES
from training.routers import Knobs, elastic_forward, install_masks

BATCH, TEXT, SIDE, CHANNELS = 5, 6, 4, 32


@pytest.fixture
def transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return model.requires_grad_(False)


@pytest.fixture
def routers() -> RouterStack:
    torch.manual_seed(1)
    stack = RouterStack(5, CHANNELS, hidden=8)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.5)
    return stack


@pytest.fixture
def streams(transformer: FluxTransformer2DModel) -> Streams:
    torch.manual_seed(2)
    return adapter.prologue(
        transformer,
        torch.randn(BATCH, SIDE * SIDE, 16),
        torch.rand(BATCH),
        torch.full((BATCH,), 3.0),
        torch.randn(BATCH, TEXT, CHANNELS),
        torch.randn(BATCH, 24),
        adapter.rotary_embedding(transformer, TEXT, SIDE, SIDE),
    )


@pytest.mark.parametrize("knobs", [Knobs(0.3, 0.0), Knobs(0.5, 1.0), Knobs(0.6, 3.0)])
def test_training_forward_gives_what_serving_gives(
    transformer: FluxTransformer2DModel, routers: RouterStack, streams: Streams, knobs: Knobs
) -> None:
    # Given what serving does under the same settings
    policy = Policy(skip_threshold=knobs.skip_threshold, width_bias=knobs.width_bias)
    names = list(adapter.blocks(transformer))
    costs = dict.fromkeys(names, BlockCost(1.0, 1.0))
    rows = [Row(RULES["router"], policy, "cond", 1, costs) for _ in range(BATCH)]
    served = streams
    for i, (name, block) in enumerate(adapter.blocks(transformer).items()):
        first, _, column = mlp_layers(block)
        inner = ("ff.net.0.proj", "ff.net.2") if name.startswith("double") else ("proj_mlp", "proj_out")
        variants = {
            width: narrowed(
                block,
                {inner[0]: int(first.out_features * width)},
                {inner[1]: column + int(first.out_features * width)},
            )
            for width in MLP_WIDTHS
        }
        router = routers.routers[i]
        elastic = ElasticBlock(name, variants, adapter.call_block, router)
        with torch.no_grad():
            served = run_block(elastic, i, served, router.modulation(streams.temb), rows).streams
    with torch.no_grad():
        expected = adapter.epilogue(transformer, served)

    # When the training forward runs
    install_masks(transformer)
    velocity, gates, widths = elastic_forward(transformer, routers, streams, knobs)

    # Then velocities and decisions are the same
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-4)
    ran = torch.tensor([[entry.decision is Decision.RUN for entry in row.journal.trace] for row in rows]).T
    assert torch.equal(gates > 0.5, ran)
    assert ran.any()
    assert not ran.all()
    served_widths = torch.tensor([[entry.mlp_width for entry in row.journal.trace] for row in rows]).T
    torch.testing.assert_close(widths[ran], served_widths[ran])


def test_every_router_learns_from_the_result(
    transformer: FluxTransformer2DModel, routers: RouterStack, streams: Streams
) -> None:
    """Also where its gate is closed: the block is computed all the same, and its gradient says what it would add."""
    for module in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
    install_masks(transformer)
    velocity, gates, _ = elastic_forward(transformer, routers, streams, Knobs(0.6, 1.0))
    assert (gates < 0.5).any()
    velocity.square().mean().backward()
    for router in routers.routers:
        assert router.gate_head.weight.grad is not None
        assert router.gate_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("threshold", "bias"), [(0.0, 0.0), (0.5, 2.0), (1.0, 4.0)])
def test_higher_settings_ask_for_less(threshold: float, bias: float) -> None:
    knobs, harder = Knobs(threshold, bias), Knobs(threshold + 0.1, bias + 0.1)
    assert harder.target_gate < knobs.target_gate <= 1
    assert harder.target_width < knobs.target_width <= 1


def test_permuted_neurons_leave_the_dense_model_as_it_is(transformer: FluxTransformer2DModel, streams: Streams) -> None:
    def dense() -> torch.Tensor:
        inner = streams
        for block in adapter.blocks(transformer).values():
            text, image = adapter.call_block(block, inner)
            inner = Streams(image, text, inner.temb, inner.image_rotary_emb)
        return adapter.epilogue(transformer, inner)

    before = dense()
    blocks = adapter.blocks(transformer)
    permute_neurons(blocks, {name: torch.randperm(mlp_layers(b)[0].out_features) for name, b in blocks.items()})
    torch.testing.assert_close(dense(), before, atol=1e-5, rtol=1e-5)
