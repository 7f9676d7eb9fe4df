"""Tiny transformers of every family with random weights, and lessons that fit them."""

from collections.abc import Mapping, Sequence

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.families.hunyuan3d.conditioner import SingleImageEncoder
from models.families.hunyuan3d.plain_dit import HunYuanDiTPlain
from training.backbone import Backbone
from training.lesson import Condition, Lesson
from training.scenes.backbones import FluxBackbone, QwenImageBackbone
from training.scenes.lesson import SceneLesson
from training.scenes.scenes import Scene
from training.scenes.text import MAX_SEQUENCE_LENGTH, QWEN_SEQUENCE_LENGTH
from training.solids.backbone import Hunyuan3DBackbone
from training.solids.lesson import SolidLesson

NUM_BLOCKS = 5
TEXT_CHANNELS = 24


class RandomConditioner:
    """Embeds each prompt as random numbers that depend on the prompt alone, and records the prompts."""

    tokenizers: Mapping[str, PreTrainedTokenizerBase]
    encoders: Mapping[str, PreTrainedModel]

    def __init__(self, num_tokens: int, has_pooled: bool) -> None:
        self.tokenizers, self.encoders = {}, {}
        self.num_tokens, self.has_pooled = num_tokens, has_pooled
        self.asked: list[str] = []

    def caption(self, scene: Scene) -> str:
        return scene.caption

    def encode(self, prompts: Sequence[str]) -> Condition:
        self.asked += prompts
        embeds, lengths = [], []
        for prompt in prompts:
            rng = torch.Generator().manual_seed(sum(prompt.encode()))
            embeds.append(torch.randn(self.num_tokens + 1, TEXT_CHANNELS, generator=rng))
            lengths.append(min(self.num_tokens, 5 + len(prompt.split())))
        batch = torch.stack(embeds)
        if self.has_pooled:
            return Condition(batch[:, 1:], batch[:, 0], None)
        return Condition(batch[:, 1:], None, torch.arange(self.num_tokens) < torch.tensor(lengths)[:, None])


def build_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_CHANNELS,
        pooled_projection_dim=TEXT_CHANNELS,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def build_qwen_image() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=32,
        out_channels=8,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_CHANNELS,
        axes_dims_rope=(4, 6, 6),
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def build_hunyuan3d() -> HunYuanDiTPlain:
    return HunYuanDiTPlain(
        in_channels=32,
        hidden_size=32,
        context_dim=TEXT_CHANNELS,
        depth=5,
        num_heads=2,
        num_moe_layers=2,
        num_experts=3,
        moe_top_k=2,
        qkv_bias=False,
        qk_norm=True,
    )


@pytest.fixture(params=["flux", "qwen_image", "hunyuan3d"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """Five blocks of 32 channels. Each test gets its own, to change freely."""
    torch.manual_seed(0)
    match request.param:
        case "flux":
            return FluxBackbone(build_flux())
        case "qwen_image":
            return QwenImageBackbone(build_qwen_image())
        case _:
            return Hunyuan3DBackbone(build_hunyuan3d())


def tiny_conditioner() -> SingleImageEncoder:
    config = {
        "hidden_size": TEXT_CHANNELS,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    kwargs = {"config": config, "image_size": 28, "use_cls_token": True}
    return SingleImageEncoder(main_image_encoder={"type": "DinoImageEncoder", "kwargs": kwargs})


@pytest.fixture
def lesson(backbone: Backbone) -> Lesson:
    """A lesson that fits `backbone`, with 40 random samples of 64 tokens."""
    rng = torch.Generator().manual_seed(3)
    latents = torch.randn(40, 64, 32, generator=rng)
    if isinstance(backbone, Hunyuan3DBackbone):
        images = torch.randint(256, (8, 3, 28, 28), dtype=torch.uint8, generator=rng)
        symmetries = torch.randint(8, (40,), generator=rng)
        return SolidLesson(latents, torch.arange(40) % 8, symmetries, images, tiny_conditioner())
    if isinstance(backbone, FluxBackbone):
        conditioner = RandomConditioner(MAX_SEQUENCE_LENGTH, has_pooled=True)
    else:
        conditioner = RandomConditioner(QWEN_SEQUENCE_LENGTH, has_pooled=False)
    return SceneLesson(latents, conditioner, backbone.channels, has_fragments=not backbone.has_guidance_embedding)
