"""What routers learn must be what serving does with them."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.elastic.compute import BlockCost
from models.elastic.router import RouterStack
from models.elastic.row import Row
from models.elastic.runner import run_block
from models.elastic.streams import Streams
from models.families.flux import adapter as flux
from models.families.hunyuan3d import plain_adapter as hunyuan3d
from models.families.qwen_image import adapter as qwen_image
from models.families.wrapping import elastic_blocks
from models.neuron_order import mlps_by_name
from models.report import Decision
from models.rules import RULES
from models.rules.router import RouterPolicy
from models.weights import RouterWeights
from training.backbone import Backbone, run_all
from training.lesson import Condition, Lesson
from training.published import PublishedObjective
from training.routers import Knobs, RouterObjective, elastic_forward, install_masks, order_neurons
from training.scenes.backbones import FluxBackbone, QwenImageBackbone
from training.solids.backbone import Hunyuan3DBackbone

BATCH = 5
ADAPTERS = {FluxBackbone: flux, QwenImageBackbone: qwen_image, Hunyuan3DBackbone: hunyuan3d}

# Under autocast, norms keep their weights in float32.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")


@pytest.fixture
def routers(backbone: Backbone) -> RouterStack:
    torch.manual_seed(1)
    stack = RouterStack(5, backbone.channels, hidden=8)
    for parameter in stack.parameters():
        nn.init.normal_(parameter, std=0.5)
    return stack


@pytest.fixture
def streams(backbone: Backbone, lesson: Lesson) -> Streams:
    """The input of the first block; prompts, if the family has prompts, have different lengths."""
    backbone.transformer.requires_grad_(False)
    rng = torch.Generator().manual_seed(2)
    latents, timestep = torch.randn(BATCH, 64, 32, generator=rng), torch.rand(BATCH, generator=rng)
    return backbone.prologue(latents, timestep, torch.full((BATCH,), 3.0), lesson.full_conditions([*range(BATCH)]))


@pytest.mark.parametrize("knobs", [Knobs(0.3, 0.0), Knobs(0.5, 1.0), Knobs(0.6, 3.0)])
def test_training_forward_equals_serving(
    backbone: Backbone, routers: RouterStack, streams: Streams, knobs: Knobs
) -> None:
    # Given the decisions and the velocity of serving under these settings
    policy = RouterPolicy(skip_threshold=knobs.skip_threshold, width_bias=knobs.width_bias)
    blocks = elastic_blocks(backbone.transformer, ADAPTERS[type(backbone)], RouterWeights(routers))
    costs = dict.fromkeys(backbone.blocks, BlockCost(1.0, 1.0))
    rows = [Row(RULES["router"], policy, "cond", 1, costs) for _ in range(BATCH)]
    served = streams
    with torch.no_grad():
        for i, (block, router) in enumerate(zip(blocks, routers.routers, strict=True)):
            served = run_block(block, i, served, router.modulation(streams.temb), rows).streams
        expected = backbone.epilogue(served)

    # When the training forward runs
    install_masks(backbone)
    velocity, decided = elastic_forward(backbone, routers, streams, knobs)

    # Then velocities and decisions are equal
    torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-4)
    ran = torch.tensor([[entry.decision is Decision.RUN for entry in row.journal.plans] for row in rows]).T
    assert torch.equal(decided.gates > 0.5, ran)
    assert ran.any()
    assert not ran.all()
    served_widths = torch.tensor([[entry.mlp_width for entry in row.journal.plans] for row in rows]).T
    torch.testing.assert_close(decided.widths[ran], served_widths[ran])


def test_every_router_gets_a_gradient(backbone: Backbone, routers: RouterStack, streams: Streams) -> None:
    """Closed gates too: their blocks are computed, so the gradient shows the effect of opening them."""
    for module in backbone.blocks.values():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.2)
    install_masks(backbone)
    velocity, decided = elastic_forward(backbone, routers, streams, Knobs(0.6, 1.0))
    assert (decided.gates < 0.5).any()
    velocity.square().mean().backward()
    for router in routers.routers:
        assert router.gate_head.weight.grad is not None
        assert router.gate_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("threshold", "bias"), [(0.0, 0.0), (0.5, 2.0), (1.0, 4.0)])
def test_higher_settings_have_lower_targets(threshold: float, bias: float) -> None:
    knobs, harder = Knobs(threshold, bias), Knobs(threshold + 0.1, bias + 0.1)
    assert harder.target_gate < knobs.target_gate <= 1
    assert harder.target_width < knobs.target_width <= 1


ROWS = [0, 1, 2, 3, 4, 5]


def losses(objective: RouterObjective, knobs: Knobs) -> dict[str, Tensor]:
    return objective.losses(ROWS, torch.Generator().manual_seed(4), knobs)


def test_routers_that_run_everything_have_no_distance_to_the_dense_model(
    backbone: Backbone, lesson: Lesson, routers: RouterStack
) -> None:
    objective = RouterObjective(backbone, lesson, routers)
    everything, little = losses(objective, Knobs(0.0, -1e6)), losses(objective, Knobs(0.6, 3.0))
    assert everything["dense"] < 1e-4 * little["dense"]
    assert everything["gate"] < 1e-6
    assert all(value.isfinite() for value in little.values())


def test_classifier_free_guidance_pairs_each_sample_with_its_unconditional_branch(
    backbone: Backbone, lesson: Lesson, routers: RouterStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Condition] = []
    prologue = backbone.prologue

    def recorded(latents: Tensor, timestep: Tensor, guidance: Tensor, condition: Condition) -> Streams:
        seen.append(condition)
        return prologue(latents, timestep, guidance, condition)

    monkeypatch.setattr(backbone, "prologue", recorded)
    losses(RouterObjective(backbone, lesson, routers), Knobs(0.5, 1.0))
    full, none = lesson.full_conditions(ROWS).embeds, lesson.no_condition.embeds
    expected = full if backbone.has_guidance_embedding else torch.cat((full[:3], none.expand(3, -1, -1)))
    assert torch.equal(seen[0].embeds, expected)


def test_published_objective_wants_fewer_blocks_at_higher_noise(
    backbone: Backbone, lesson: Lesson, routers: RouterStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = PublishedObjective(backbone, lesson, routers)
    seen: list[Tensor] = []
    prologue = backbone.prologue

    def recorded(latents: Tensor, timestep: Tensor, guidance: Tensor, condition: Condition) -> Streams:
        seen.append(timestep)
        return prologue(latents, timestep, guidance, condition)

    monkeypatch.setattr(backbone, "prologue", recorded)
    for router in routers.routers:
        for head, bias in ((router.gate_head, [0.0]), (router.width_head, [0.0, 0.0, 0.0, 50.0])):
            nn.init.zeros_(head.weight)
            head.bias.data.copy_(torch.tensor(bias))
    found = losses(objective, objective.knobs(torch.Generator()))
    # Every gate is even, and every width full
    assert len(set(seen[0].tolist())) >= 3
    expected = (0.5 - (0.7 - 0.3 * seen[0])).square().mean()
    torch.testing.assert_close(found["gate"], expected)
    assert found["width"].item() == pytest.approx(0.2**2, abs=1e-5)
    assert set(objective.WEIGHTS) == set(found)


def test_neurons_are_ordered_by_importance(
    backbone: Backbone, lesson: Lesson, streams: Streams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test makes the last neuron the strongest and the first one silent; new routers run all neurons."""
    mlps = mlps_by_name(backbone.blocks, backbone.mlps)
    for mlp in mlps.values():
        with torch.no_grad():
            mlp.last.weight[:, -1] *= 1000
            mlp.last.weight[:, mlp.column] = 0
    before, old = run_all(backbone, streams), copy.deepcopy(mlps)
    save_file(backbone.transformer.state_dict(), tmp_path / "transformer.safetensors")
    monkeypatch.setattr("training.routers.BATCH_SIZE", len(ROWS) // 2)
    order_neurons(backbone, lesson, tmp_path / "transformer.safetensors")
    backbone.transformer.load_state_dict(load_file(tmp_path / "transformer.safetensors"))
    for name, mlp in mlps.items():
        weight, old_weight = mlp.first.weight[mlp.row :], old[name].first.weight[mlp.row :]
        assert torch.equal(mlp.last.weight[:, mlp.column], old[name].last.weight[:, -1])
        assert not mlp.last.weight[:, -1].any()
        assert sorted(weight.tolist()) == sorted(old_weight.tolist())
        assert torch.equal(weight[0], old_weight[-1])
    for block in backbone.blocks.values():
        for mlp in backbone.mlps(block).values():
            mlp.last.width_mask = torch.ones(())
    torch.testing.assert_close(run_all(backbone, streams), before, atol=1e-3, rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["transformer.safetensors"]
