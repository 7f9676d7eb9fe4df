"""A FLUX pipeline of six blocks with random weights, random routers for it, and engines that serve it."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from models.card import EXACT, CurvePoint, Policy
from models.elastic.router import RouterStack
from models.engine import Engine, load_engine
from models.families.flux import adapter
from models.families.flux.pipeline import FluxFamily, mlp_layers
from models.request import GenerationRequest, Preset, PresetBudget
from models.state import DenoiseState
from models.weights import RouterWeights, load_router_weights, save_router_weights, sha256, write_curve
from training.text import MAX_SEQUENCE_LENGTH, build_clip, build_t5

MODEL = "tiny-flux"
CHANNELS = 32
WORDS = ("a", "small", "large", "red", "blue", "green", "circle", "square", "triangle", "on", "the", "left", "right")
TRANSFORMER_FILE = "transformer/diffusion_pytorch_model.safetensors"
CURVE = (
    EXACT,
    CurvePoint("router", Policy(skip_threshold=0.3), 0.8, 0.85, 0.95, Preset.HIGH),
    CurvePoint("router", Policy(0.5, 0.2, 2, width_bias=1.0), 0.5, 0.6, 0.8, Preset.BALANCED),
    CurvePoint("router", Policy(0.8, 0.3, 3, width_bias=2.0), 0.2, 0.3, 0.5, Preset.DRAFT),
)


def build_transformer(guidance_embeds: bool) -> FluxTransformer2DModel:
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
    with torch.no_grad():
        for block in adapter.blocks(transformer).values():
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear):
                    # Large modulations: prompt, guidance and step reach every block, and every block matters.
                    std = 0.3 if name.startswith("norm") else 0.15
                    module.weight.normal_(std=std)
                    module.bias.normal_(std=0.1)
    return transformer


def build_vae() -> AutoencoderKL:
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


def build_text() -> tuple[T5Tokenizer, T5EncoderModel, CLIPTokenizer, CLIPTextModel]:
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


def save_pipeline(directory: Path, *, guidance_embeds: bool) -> None:
    """Guidance and dynamic shifting as in FLUX.1-dev, or neither, as in FLUX.1-schnell."""
    t5_tokenizer, t5, clip_tokenizer, clip = build_text()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance_embeds),
        vae=build_vae(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=build_transformer(guidance_embeds),
    ).save_pretrained(directory)


def build_routers() -> RouterStack:
    """Random routers whose decisions differ from block to block, sample to sample and step to step."""
    torch.manual_seed(2)
    stack = RouterStack(6, CHANNELS, hidden=16)
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


def save_routers(folder: Path, model_directory: Path, *, permuted: bool) -> None:
    blocks = adapter.blocks(build_transformer(True))
    rng = torch.Generator().manual_seed(3)
    orders = {name: torch.randperm(mlp_layers(block)[0].out_features, generator=rng) for name, block in blocks.items()}
    save_router_weights(RouterWeights(build_routers(), orders if permuted else {}), folder)
    write_curve(folder, CURVE, "ssim", {"prompts": 0})
    manifest = {
        "license": "apache-2.0",
        "defaults": {"num_inference_steps": 4, "guidance_scale": 2.5},
        "sha256": {
            "router.safetensors": sha256(folder / "router.safetensors"),
            TRANSFORMER_FILE: sha256(model_directory / TRANSFORMER_FILE),
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory like FLUX.1-dev's."""
    directory = tmp_path_factory.mktemp("dev") / MODEL
    save_pipeline(directory, guidance_embeds=True)
    return directory


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory like FLUX.1-schnell's."""
    directory = tmp_path_factory.mktemp("schnell") / MODEL
    save_pipeline(directory, guidance_embeds=False)
    return directory


@pytest.fixture(scope="session")
def router_weights(tmp_path_factory: pytest.TempPathFactory, tiny_flux: Path) -> Path:
    """Router folders; the one for `tiny_flux` keeps its neurons where they are."""
    root = tmp_path_factory.mktemp("router_weights")
    save_routers(root / MODEL, tiny_flux, permuted=False)
    return root


@pytest.fixture(scope="session")
def permuted_router_weights(tmp_path_factory: pytest.TempPathFactory, tiny_flux: Path) -> Path:
    root = tmp_path_factory.mktemp("permuted_router_weights")
    save_routers(root / MODEL, tiny_flux, permuted=True)
    return root


@pytest.fixture(scope="session")
def engine(tiny_flux: Path, router_weights: Path) -> Engine:
    return load_engine([tiny_flux], device="cpu", router_weights=router_weights)


@pytest.fixture(scope="session")
def plain_engine(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Serves a model that has no router folder."""
    return load_engine([tiny_flux], device="cpu", router_weights=tmp_path_factory.mktemp("none"))


@pytest.fixture(scope="session")
def permuted_engine(tiny_flux: Path, permuted_router_weights: Path) -> Engine:
    return load_engine([tiny_flux], device="cpu", router_weights=permuted_router_weights)


@pytest.fixture(scope="session")
def family(tiny_flux: Path, router_weights: Path) -> FluxFamily:
    return FluxFamily.load(tiny_flux, "cpu", torch.float32, load_router_weights(router_weights / MODEL, tiny_flux))


@pytest.fixture(scope="session")
def open_engine(family: FluxFamily, engine: Engine) -> Engine:
    """An engine over `family`, for tests that look at its blocks."""
    return Engine({MODEL: family}, engine.cards)


@pytest.fixture(scope="session")
def stock(tiny_flux: Path) -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(tiny_flux, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def ask() -> Callable[..., GenerationRequest]:
    """A request with the fields named, the rest silent."""

    def ask(**fields: Any) -> GenerationRequest:
        silent: dict[str, Any] = {
            "model": MODEL,
            "prompt": "a small red circle on the left",
            "height": 64,
            "width": 64,
            "num_inference_steps": 4,
            "guidance_scale": 3.5,
            "seed": 0,
            "budget": PresetBudget(Preset.EXACT),
            "wants_trace": True,
        }
        return GenerationRequest(**(silent | fields))

    return ask


@pytest.fixture(scope="session")
def denoise() -> Callable[..., DenoiseState]:
    """Run a request alone to its last step."""

    def denoise(engine: Engine, request: GenerationRequest, point: CurvePoint | None = None) -> DenoiseState:
        state = engine.start(request, point)
        while not state.is_done:
            engine.step([state])
        return state

    return denoise
