"""`edit_mlp`: the image MLP with prefix widths, under official weights.

The official MLP chooses its width itself, from logits of several shapes. In our code the runner chooses it, from one
set of logits per row. So logits for a whole batch are given to each of its rows. Logits per token are averaged, as our
router averages before its heads. An input without a token axis counts as one token.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor
from torch.nn import functional as F

from models.elastic.compute import BlockCost
from models.elastic.plan import MLP_WIDTHS
from models.elastic.router import Router, Scores
from models.elastic.row import Row
from models.elastic.runner import ElasticBlock, run_block
from models.elastic.streams import Streams
from models.families.qwen_image import adapter
from models.families.qwen_image.pipeline import set_activation
from models.families.wrapping import elastic_blocks
from models.report import Decision
from models.rules import RULES
from models.rules.router import RouterPolicy
from models.weights import MlpActivation
from training.routers import hard_width, install_masks, prefix_mask
from training.scenes.backbones import QwenImageBackbone

NEAR: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-4}


class Told(Router):
    """A router that lets every row run, with the given width logits `(batch, 4)`."""

    def __init__(self, width_logits: Tensor) -> None:
        super().__init__(channels=1, hidden=1)
        self.width_logits = width_logits

    def forward(self, *_: Any) -> Scores:
        return Scores(F.pad(self.width_logits, (1, 0), value=9.0))


@pytest.fixture(scope="module")
def recording(recorded: Callable[[str], Any]) -> Any:
    return recorded("edit_mlp")


@pytest.fixture
def transformer(recording: Any) -> QwenImageTransformer2DModel:
    """A transformer of one block, whose image MLP is the recorded one."""
    dim = recording.settings["config"]["dim"]
    transformer = QwenImageTransformer2DModel(
        in_channels=4,
        out_channels=1,
        num_layers=1,
        attention_head_dim=dim,
        num_attention_heads=1,
        joint_attention_dim=4,
        axes_dims_rope=(2, 2, 2),
    )
    prefix = "transformer_blocks.0.img_mlp."
    block = transformer.transformer_blocks[0]
    block.img_mlp.load_state_dict({key.removeprefix(prefix): value for key, value in recording.weights.items()})
    set_activation(transformer, MlpActivation.GELU_SIGMOID)
    return transformer.requires_grad_(False)


@pytest.fixture
def block(transformer: QwenImageTransformer2DModel) -> ElasticBlock:
    return elastic_blocks(transformer, adapter, None)[0]


def run_mlp(block: ElasticBlock, x: Tensor, width_logits: Tensor | None) -> tuple[Tensor, list[float]]:
    """Run the image MLP as a block on `x` `(batch, tokens, channels)`. Returns the output and the widths.

    Without logits there is no router, and every row runs in full.
    """

    def call(module: Any, streams: Streams) -> tuple[Tensor, Tensor]:
        return streams.encoder_hidden_states, module.img_mlp(streams.hidden_states)

    router = None if width_logits is None else Told(width_logits)
    rule = RULES["router" if router else "dense"]
    rows = [Row(rule, RouterPolicy(skip_threshold=0.5), "cond", 1, {block.name: BlockCost(1, 1)}) for _ in x]
    streams, modulation = Streams(x, x[:, :0], x[:, 0]), x[:, 0]
    result = run_block(ElasticBlock(block.name, block.variants, call, router), 0, streams, modulation, rows)
    trace = [row.journal.plans[0] for row in rows]
    assert {entry.decision for entry in trace} == {Decision.RUN}
    return result.streams.hidden_states, [entry.mlp_width for entry in trace]


@pytest.mark.parametrize("case", ["batch", "vec", "tok", "flat"])
def test_every_row_has_the_recorded_width_and_output(recording: Any, block: ElasticBlock, case: str) -> None:
    x, logits = (recording.tensors[f"in/{case}/{name}"] for name in ("x", "width_logits"))
    expected = recording.tensors[f"out/{case}/y"].reshape(len(x), -1, x.shape[-1])
    if logits.ndim == 3:
        logits = logits.mean(1)
    y, widths = run_mlp(block, x.reshape(expected.shape), logits.expand(len(x), -1))
    assert widths == [MLP_WIDTHS[i] for i in recording.tensors[f"out/{case}/width_idx"].tolist()]
    torch.testing.assert_close(y, expected, **NEAR)


def test_all_widths_occur_in_one_batch(recording: Any) -> None:
    assert set(recording.tensors["out/batch/width_idx"].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("index", range(len(MLP_WIDTHS)))
def test_each_width_keeps_the_recorded_prefix(recording: Any, block: ElasticBlock, index: int) -> None:
    mlp: Any = block.variants[MLP_WIDTHS[index]].img_mlp
    assert mlp.net[0].proj.out_features == recording.settings["prefix_widths"][index]
    y = mlp(recording.tensors["in/batch/x"])
    torch.testing.assert_close(y, recording.tensors[f"out/width{index}/y"], **NEAR)


def test_without_logits_the_mlp_runs_in_full(recording: Any, block: ElasticBlock) -> None:
    y, widths = run_mlp(block, recording.tensors["in/batch/x"], None)
    assert set(widths) == {1.0}
    torch.testing.assert_close(y, recording.tensors["out/none/y"], **NEAR)


def test_training_masks_give_the_recorded_values_and_gradients(
    recording: Any, transformer: QwenImageTransformer2DModel
) -> None:
    x, logits = (recording.tensors[f"in/batch/{name}"].clone().requires_grad_() for name in ("x", "width_logits"))
    backbone = QwenImageBackbone(transformer)
    install_masks(backbone)
    block: Any = next(iter(backbone.blocks.values()))
    _, last, _, column = backbone.mlps(block)[""]
    last.width_mask = prefix_mask(hard_width(logits), last.in_features - column, column)
    y = block.img_mlp(x)
    (y * recording.tensors["in/train/cotangent"]).sum().backward()
    torch.testing.assert_close(y, recording.tensors["out/train/y"], **NEAR)
    torch.testing.assert_close(x.grad, recording.tensors["out/train/x_grad"], **NEAR)
    torch.testing.assert_close(logits.grad, recording.tensors["out/train/width_logits_grad"], **NEAR)
