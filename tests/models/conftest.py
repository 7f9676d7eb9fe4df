"""Tiny pipelines with random weights, one a family, random routers for them, and engines that serve them.

Tests that use `kind`, or anything made from it, run for every family; a family's own folder narrows it to that one.
"""

import json
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, Qwen2Tokenizer, T5EncoderModel, T5Tokenizer

from models.card import EXACT, CurvePoint, Policy
from models.elastic.router import RouterStack
from models.engine import Engine, load_engine
from models.families.flux import adapter as flux
from models.families.flux.pipeline import FluxFamily
from models.families.picture import PictureFamily
from models.families.qwen_image import adapter as qwen_image
from models.families.qwen_image.pipeline import QwenImageFamily
from models.families.wrapping import Anatomy
from models.request import GenerationRequest, Preset, PresetBudget
from models.state import DenoiseState
from models.weights import (
    CheckpointTraits,
    RouterWeights,
    load_router_weights,
    save_router_weights,
    sha256,
    write_curve,
)
from training.text import MAX_SEQUENCE_LENGTH, build_clip, build_qwen, build_t5

CHANNELS = 32
WORDS = ("a", "small", "large", "red", "blue", "green", "circle", "square", "triangle", "on", "the", "left", "right")
TRANSFORMER_FILE = "transformer/diffusion_pytorch_model.safetensors"
CURVE = (
    EXACT,
    CurvePoint("router", Policy(skip_threshold=0.3), 0.8, 0.85, 0.95, Preset.HIGH),
    CurvePoint("router", Policy(0.5, 0.2, 2, width_bias=1.0), 0.5, 0.6, 0.8, Preset.BALANCED),
    CurvePoint("router", Policy(0.8, 0.3, 3, width_bias=2.0), 0.2, 0.3, 0.5, Preset.DRAFT),
)


def enlarge(blocks: Mapping[str, nn.Module]) -> None:
    """Large modulations: prompt, guidance and step reach every block, and every block matters."""
    with torch.no_grad():
        for block in blocks.values():
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    is_modulation = name.startswith("norm") or "_mod." in name
                    module.weight.normal_(std=0.3 if is_modulation else 0.15)
                    module.bias.normal_(std=0.1)


def build_flux(*, guidance_embeds: bool) -> FluxTransformer2DModel:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    enlarge(flux.blocks(transformer))
    return transformer


def build_qwen_image() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=32,
        out_channels=8,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        axes_dims_rope=(4, 6, 6),
    )
    enlarge(qwen_image.blocks(transformer))
    with torch.no_grad():
        # Its time embedding holds the time alone; let steps differ as much as FLUX's do.
        transformer.time_text_embed.timestep_embedder.linear_2.weight.mul_(2)
    return transformer


def build_flux_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=4,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=0.8,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def build_qwen_image_vae() -> AutoencoderKLQwenImage:
    torch.manual_seed(1)
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=8,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False] * 3,
        latents_mean=[0.1 * i for i in range(8)],
        latents_std=[0.8 + 0.1 * i for i in range(8)],
    )


def build_flux_text() -> tuple[T5Tokenizer, T5EncoderModel, CLIPTokenizer, CLIPTextModel]:
    """The small encoders that the repository trains, untrained, with tokenizers of a few words and all letters."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -1.0) for word in WORDS]
    pieces += [(char, -8.0) for char in string.ascii_letters]
    t5_tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(f"{char}</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    clip_tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=MAX_SEQUENCE_LENGTH)
    return t5_tokenizer, build_t5(len(t5_tokenizer)), clip_tokenizer, build_clip(clip_tokenizer)


def build_qwen_tokenizer() -> Qwen2Tokenizer:
    """One token for each word, so that the pipeline's template begins with its 34; prompts of up to 35 more, and 5."""
    template = QwenImagePipeline(None, None, None, None, None).prompt_template_encode
    blank = Qwen2Tokenizer(extra_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=34 + 35 + 5)
    texts = [template.format(prompt) for prompt in (" ".join(WORDS + WORDS), *WORDS)]
    tokenizer: Qwen2Tokenizer = blank.train_new_from_iterator(texts, vocab_size=2000, show_progress=False)
    return tokenizer


def save_flux(directory: Path, *, guidance_embeds: bool) -> None:
    """Guidance and dynamic shifting as in FLUX.1-dev, or neither, as in FLUX.1-schnell."""
    t5_tokenizer, t5, clip_tokenizer, clip = build_flux_text()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds),
        vae=build_flux_vae(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=build_flux(guidance_embeds=guidance_embeds),
    ).save_pretrained(directory)


def save_qwen_image(directory: Path) -> None:
    tokenizer = build_qwen_tokenizer()
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=build_qwen_image_vae(),
        text_encoder=build_qwen(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=build_qwen_image(),
    ).save_pretrained(directory)


@dataclass(frozen=True, slots=True)
class Kind:
    """One family and its test model.

    `true_scale` is the request's field that switches true guidance on, `silent` what `ask` assumes besides what all
    families share, `other_scale` a guidance scale that is not the silent one and does not switch true guidance on.
    """

    model: str
    directory: str
    family: type[PictureFamily]
    anatomy: Anatomy
    pipeline: type[DiffusionPipeline]
    true_scale: str
    silent: Mapping[str, Any]
    other_scale: Mapping[str, Any]
    defaults: Mapping[str, Any]


KINDS = {
    "flux": Kind(
        model="tiny-flux",
        directory="tiny_flux",
        family=FluxFamily,
        anatomy=flux,
        pipeline=FluxPipeline,
        true_scale="true_cfg_scale",
        silent={"guidance_scale": 3.5},
        other_scale={"guidance_scale": 7.0},
        defaults={"num_inference_steps": 4, "guidance_scale": 2.5},
    ),
    "qwen_image": Kind(
        model="tiny-qwen-image",
        directory="tiny_qwen_image",
        family=QwenImageFamily,
        anatomy=qwen_image,
        pipeline=QwenImagePipeline,
        true_scale="guidance_scale",
        silent={"guidance_scale": 1.0},
        other_scale={"guidance_scale": 0.0},
        defaults={"num_inference_steps": 4, "guidance_scale": 2.5, "height": 64, "width": 80},
    ),
}


def build_routers(num_blocks: int) -> RouterStack:
    """Random routers whose decisions differ from block to block, sample to sample and step to step."""
    torch.manual_seed(2)
    stack = RouterStack(num_blocks, CHANNELS, hidden=16)
    with torch.no_grad():
        for name, parameter in stack.named_parameters():
            if "img_mod.1.weight" in name or "out.0.weight" in name:
                parameter.normal_(std=0.5)
            elif "out.2" in name or "width_head" in name:
                parameter.normal_(std=0.4 if name.endswith("weight") else 0.2)
                if name.endswith("weight"):
                    # The trunk's outputs have about the same mean; without it, what differs between inputs decides.
                    parameter.sub_(parameter.mean(1, keepdim=True))
    return stack


def save_routers(folder: Path, kind: Kind, model_directory: Path, *, permuted: bool) -> None:
    transformer = kind.pipeline.from_pretrained(model_directory, local_files_only=True).transformer
    blocks = kind.anatomy.blocks(transformer)
    rng = torch.Generator().manual_seed(3)
    orders = {
        name: torch.randperm(kind.anatomy.mlp_layers(block)[0].out_features, generator=rng)
        for name, block in blocks.items()
    }
    save_router_weights(RouterWeights(build_routers(len(blocks)), orders if permuted else {}), folder)
    write_curve(folder, CURVE, "ssim", {"prompts": 0})
    manifest = {
        "license": "apache-2.0",
        "defaults": kind.defaults,
        "sha256": {
            "router.safetensors": sha256(folder / "router.safetensors"),
            TRANSFORMER_FILE: sha256(model_directory / TRANSFORMER_FILE),
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory like FLUX.1-dev's."""
    directory = tmp_path_factory.mktemp("dev") / "tiny-flux"
    save_flux(directory, guidance_embeds=True)
    return directory


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory like FLUX.1-schnell's."""
    directory = tmp_path_factory.mktemp("schnell") / "tiny-flux"
    save_flux(directory, guidance_embeds=False)
    return directory


@pytest.fixture(scope="session")
def tiny_qwen_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory like Qwen-Image's."""
    directory = tmp_path_factory.mktemp("qwen") / "tiny-qwen-image"
    save_qwen_image(directory)
    return directory


@pytest.fixture(scope="session")
def model(kind: Kind) -> str:
    return kind.model


@pytest.fixture(scope="session")
def directory(request: pytest.FixtureRequest, kind: Kind) -> Path:
    """The family's pipeline directory."""
    directory: Path = request.getfixturevalue(kind.directory)
    return directory


@pytest.fixture(scope="session")
def router_weights(tmp_path_factory: pytest.TempPathFactory, kind: Kind, directory: Path) -> Path:
    """Router folders; the one for `directory` keeps its neurons where they are."""
    root = tmp_path_factory.mktemp("router_weights")
    save_routers(root / kind.model, kind, directory, permuted=False)
    return root


@pytest.fixture(scope="session")
def permuted_router_weights(tmp_path_factory: pytest.TempPathFactory, kind: Kind, directory: Path) -> Path:
    root = tmp_path_factory.mktemp("permuted_router_weights")
    save_routers(root / kind.model, kind, directory, permuted=True)
    return root


@pytest.fixture(scope="session")
def engine(directory: Path, router_weights: Path) -> Engine:
    return load_engine([directory], device="cpu", router_weights=router_weights)


@pytest.fixture(scope="session")
def plain_engine(kind: Kind, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Serves a model without routers and curve. It has a manifest: at Qwen-Image's own default size steps take long."""
    root = tmp_path_factory.mktemp("plain")
    (root / kind.model).mkdir()
    (root / kind.model / "manifest.json").write_text(json.dumps({"license": "mit", "defaults": kind.defaults}))
    return load_engine([directory], device="cpu", router_weights=root)


@pytest.fixture(scope="session")
def permuted_engine(directory: Path, permuted_router_weights: Path) -> Engine:
    return load_engine([directory], device="cpu", router_weights=permuted_router_weights)


@pytest.fixture(scope="session")
def family(kind: Kind, directory: Path, router_weights: Path) -> PictureFamily:
    routers = load_router_weights(router_weights / kind.model, directory)
    return kind.family.load(directory, "cpu", torch.float32, routers, CheckpointTraits(), False)


@pytest.fixture(scope="session")
def open_engine(family: PictureFamily, engine: Engine) -> Engine:
    """An engine over `family`, for tests that look at its blocks."""
    return Engine({family.model_id: family}, engine.cards)


@pytest.fixture(scope="session")
def stock(kind: Kind, directory: Path) -> DiffusionPipeline:
    pipeline = kind.pipeline.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def stock_result(kind: Kind) -> Callable[..., Any]:
    """What a stock pipeline gives for a request: latents `(1, tokens, channels)` or a list of one picture."""

    def stock_result(stock: Any, request: GenerationRequest, max_length: int, output_type: str = "latent") -> Any:
        guided = getattr(request, kind.true_scale) > 1
        fields = {"true_cfg_scale": getattr(request, kind.true_scale)}
        if kind.true_scale != "guidance_scale":
            fields["guidance_scale"] = request.guidance_scale
        return stock(
            prompt=request.prompt,
            # Where guidance is on and there is none, the stock Qwen-Image pipeline would leave guidance off.
            negative_prompt=(request.negative_prompt or "") if guided else None,
            height=request.height,
            width=request.width,
            num_inference_steps=request.num_inference_steps,
            generator=torch.Generator().manual_seed(request.seed),
            max_sequence_length=max_length,
            output_type=output_type,
            **fields,
        ).images

    return stock_result


@pytest.fixture(scope="session")
def ask(kind: Kind) -> Callable[..., GenerationRequest]:
    """A request with the fields named, the rest silent: one guidance branch."""

    def ask(**fields: Any) -> GenerationRequest:
        silent: dict[str, Any] = {
            "model": kind.model,
            "prompt": "a small red circle on the left",
            "height": 64,
            "width": 64,
            "num_inference_steps": 4,
            "seed": 0,
            "budget": PresetBudget(Preset.EXACT),
            "wants_trace": True,
        }
        return GenerationRequest(**{**silent, **kind.silent, **fields})

    return ask


@pytest.fixture(scope="session")
def guided(kind: Kind) -> Callable[..., dict[str, Any]]:
    """The fields of a request that switch true guidance on: two guidance branches."""

    def guided(negative_prompt: str = "a green triangle", scale: float = 2.0) -> dict[str, Any]:
        return {"negative_prompt": negative_prompt, kind.true_scale: scale}

    return guided


@pytest.fixture(scope="session")
def other_scale(kind: Kind) -> Mapping[str, Any]:
    """The fields of a request with another guidance scale than the silent one, and no further branch."""
    return kind.other_scale


@pytest.fixture(scope="session")
def denoise() -> Callable[..., DenoiseState]:
    """Run a request alone to its last step."""

    def denoise(engine: Engine, request: GenerationRequest, point: CurvePoint | None = None) -> DenoiseState:
        state = engine.start(request, point)
        while not state.is_done:
            engine.step([state])
        return state

    return denoise
