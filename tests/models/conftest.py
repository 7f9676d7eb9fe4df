"""Tiny pipelines with random weights, one a family, random routers for them, and engines that serve them.

Tests that use `kind`, or anything made from it, run for every family; a family's own folder narrows it to that one.
"""

import json
import string
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
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
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, Qwen2Tokenizer, T5EncoderModel, T5Tokenizer

from models.card import EXACT, CurvePoint, Policy
from models.diffusion.sampling import (
    classifier_free_guidance,
    consistency_schedule,
    euler_step,
    rising_flow_schedule,
)
from models.elastic.compute import BlockCost
from models.elastic.router import RouterStack
from models.elastic.streams import Streams
from models.engine import Engine
from models.families.family import Family
from models.families.flux import adapter as flux
from models.families.flux.pipeline import FluxFamily
from models.families.flux.streams import FluxStreams
from models.families.hunyuan3d import plain_adapter, stream_adapter
from models.families.hunyuan3d.conditioner import SingleImageEncoder
from models.families.hunyuan3d.pipeline import Hunyuan3DFamily
from models.families.hunyuan3d.plain_dit import HunYuanDiTPlain
from models.families.hunyuan3d.preparation import ImageSettings, prepare_image
from models.families.hunyuan3d.shape_vae import ShapeVAE
from models.families.hunyuan3d.stream_dit import Hunyuan3DDiT
from models.families.hunyuan3d.streams import PlainStreams
from models.families.qwen_image import adapter as qwen_image
from models.families.qwen_image.pipeline import QwenImageFamily
from models.families.qwen_image.streams import QwenImageStreams
from models.families.wrapping import Adapter, mlp_name
from models.request import BackgroundRemoval, GenerationRequest, ImageRequest, MeshRequest, Preset, PresetBudget
from models.state import DenoiseState
from models.weights import (
    CheckpointTraits,
    RouterWeights,
    load_router_weights,
    save_router_weights,
    sha256,
    write_curve,
)
from models.zoo import load_engine
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
                    is_modulation = name.startswith(("norm", "modulation")) or "_mod." in name
                    module.weight.normal_(std=0.3 if is_modulation else 0.15)
                    if module.bias is not None:
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


PLAIN_DIT = {
    "in_channels": 4,
    "hidden_size": CHANNELS,
    "context_dim": 24,
    "depth": 5,
    "num_heads": 2,
    "qk_norm": True,
    "qkv_bias": False,
    "num_moe_layers": 2,
    "num_experts": 4,
    "moe_top_k": 2,
}
STREAM_DIT = {
    "in_channels": 4,
    "context_in_dim": 24,
    "hidden_size": CHANNELS,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "qkv_bias": True,
}
SHAPE_VAE = {
    "num_latents": 12,
    "embed_dim": 4,
    "width": 16,
    "heads": 2,
    "num_decoder_layers": 1,
    "num_encoder_layers": 1,
    "num_freqs": 2,
    "include_pi": False,
    "qkv_bias": False,
    "qk_norm": True,
    "point_feats": 4,
    "scale_factor": 1.1,
}
DINO = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
}
CONDITIONER = {"main_image_encoder": {"type": "DinoImageEncoder", "kwargs": {"config": DINO, "image_size": 28}}}
HUNYUAN3D_FILE = "model.safetensors"


def save_hunyuan3d(directory: Path, denoiser: nn.Module, params: Mapping[str, Any], adapter: Adapter) -> None:
    """A published model's folder. Its schedule is the distilled one, all of whose steps have a length."""
    parts = {
        "model": (type(denoiser).__name__, params),
        "vae": ("ShapeVAE", SHAPE_VAE),
        "conditioner": ("SingleImageEncoder", CONDITIONER),
        "scheduler": ("ConsistencyFlowMatchEulerDiscreteScheduler", {"pcm_timesteps": 100}),
        "image_processor": ("ImageProcessorV2", {"size": 32, "border_ratio": 0.15}),
    }
    config = {name: {"target": f"published.{cls}", "params": dict(params)} for name, (cls, params) in parts.items()}
    modules = nn.ModuleDict(
        {"model": denoiser, "vae": ShapeVAE(**SHAPE_VAE), "conditioner": SingleImageEncoder(**CONDITIONER)}
    )
    with torch.no_grad():
        for name, parameter in modules.named_parameters():
            if not name.startswith("model."):
                parameter.normal_(std=0.3)
        # Else what the random field is at one place outweighs how it changes, and it has no surface.
        modules.get_parameter("vae.geo_decoder.output_proj.bias").zero_()
        modules.get_parameter("vae.geo_decoder.ln_post.bias").zero_()
        modules.get_parameter("vae.geo_decoder.query_proj.weight").mul_(4)
    enlarge(adapter.blocks(denoiser))
    directory.mkdir()
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    save_file(modules.state_dict(), directory / HUNYUAN3D_FILE)


def save_plain_hunyuan3d(directory: Path) -> None:
    torch.manual_seed(0)
    denoiser = HunYuanDiTPlain(**PLAIN_DIT)
    with torch.no_grad():
        # Time reaches blocks and routers through one token; let steps differ as much as FLUX's do.
        denoiser.t_embedder.mlp[0].weight.mul_(8)
        denoiser.t_embedder.mlp[2].weight.mul_(2)
    save_hunyuan3d(directory, denoiser, PLAIN_DIT, plain_adapter)


def save_stream_hunyuan3d(directory: Path) -> None:
    torch.manual_seed(0)
    denoiser = Hunyuan3DDiT(**STREAM_DIT)
    with torch.no_grad():
        denoiser.time_in.out_layer.weight.mul_(3)
    save_hunyuan3d(directory, denoiser, STREAM_DIT, stream_adapter)


class PlainHunyuan3D:
    """The same modules, loaded by torch alone, and sampling as it is published."""

    def __init__(self, directory: Path) -> None:
        self.config = yaml.safe_load((directory / "config.yaml").read_text())
        tensors = load_file(directory / HUNYUAN3D_FILE)
        self.transformer, self.vae, self.conditioner = (
            self._load(cls, part, tensors)
            for cls, part in (
                (
                    HunYuanDiTPlain if self.config["model"]["target"].endswith("Plain") else Hunyuan3DDiT,
                    "model",
                ),
                (ShapeVAE, "vae"),
                (SingleImageEncoder, "conditioner"),
            )
        )

    def _load(self, cls: type[nn.Module], part: str, tensors: Mapping[str, Tensor]) -> Any:
        module = cls(**self.config[part]["params"])
        module.load_state_dict(
            {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
        )
        return module.eval().requires_grad_(False)

    def sigmas(self, num_inference_steps: int) -> Tensor:
        scheduler = self.config["scheduler"]
        if "Consistency" in scheduler["target"]:
            return consistency_schedule(num_inference_steps, scheduler["params"]["pcm_timesteps"])
        return rising_flow_schedule(num_inference_steps)

    def latents(self, request: MeshRequest) -> Tensor:
        """All steps, also those of no length; a scale of 1 is no guidance, any other two rows."""
        settings = ImageSettings(**self.config["image_processor"]["params"])
        with Image.open(BytesIO(request.input_image)) as file:
            context = self.conditioner(prepare_image(file, settings, BackgroundRemoval.AUTO))
        rng = torch.Generator().manual_seed(request.seed)
        latents = torch.randn(1, SHAPE_VAE["num_latents"], SHAPE_VAE["embed_dim"], generator=rng)
        sigmas = self.sigmas(request.num_inference_steps)
        for sigma, next_sigma in pairwise(sigmas):
            if request.guidance_scale == 1:
                velocity = self.transformer(latents, sigma[None], context)
            else:
                rows = torch.cat((context, torch.zeros_like(context)))
                both = self.transformer(latents.repeat(2, 1, 1), sigma.repeat(2), rows)
                velocity = classifier_free_guidance(both[:1], both[1:], request.guidance_scale)
            latents = euler_step(latents, velocity, sigma, next_sigma)
        return latents


def picture_file(text: str) -> bytes:
    """A picture of its own for each text: an object in some colour and place, the rest transparent."""
    rng = np.random.default_rng(zlib.crc32(text.encode()))
    pixels = np.zeros((40, 40, 4), np.uint8)
    top, left, height, width = (*rng.integers(0, 15, 2), *rng.integers(8, 24, 2))
    pixels[top : top + height, left : left + width] = (*rng.integers(0, 255, 3), 255)
    pixels[top : top + height // 2, left : left + width // 2, :3] = rng.integers(0, 255, 3)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def mesh_request(
    *, prompt: str, height: int, width: int, negative_prompt: str | None = None, **fields: Any
) -> MeshRequest:
    """What tests ask of all families: a prompt stands for a picture, sizes and negative prompts for nothing."""
    return MeshRequest(input_image=picture_file(prompt), octree_resolution=16, **fields)


def flux_streams(family: Any, batch: int, rng: torch.Generator) -> Streams:
    """An image of 4 x 6 tokens and a prompt of 7."""
    image, text = (torch.randn(batch, count, CHANNELS, generator=rng) for count in (24, 7))
    rotary = flux.rotary_embedding(family.transformer, 7, 4, 6)
    return FluxStreams(image, text, torch.randn(batch, CHANNELS, generator=rng), rotary)


def qwen_image_streams(family: Any, batch: int, rng: torch.Generator) -> Streams:
    """An image of 4 x 6 tokens and a prompt of 7."""
    image, text = (torch.randn(batch, count, CHANNELS, generator=rng) for count in (24, 7))
    rotary = qwen_image.rotary_embedding(family.transformer, 7, 4, 6)
    return QwenImageStreams(image, text, torch.randn(batch, CHANNELS, generator=rng), *rotary)


def plain_streams(family: Any, batch: int, rng: torch.Generator) -> Streams:
    shape, time = (torch.randn(batch, count, CHANNELS, generator=rng) for count in (12, 1))
    return PlainStreams(shape, time, time[:, 0], context=torch.randn(batch, 5, 24, generator=rng))


def double_streams(family: Any, batch: int, rng: torch.Generator) -> Streams:
    shape, picture = (torch.randn(batch, count, CHANNELS, generator=rng) for count in (12, 5))
    return Streams(shape, picture, torch.randn(batch, CHANNELS, generator=rng))


def stock_picture(stock: Any, request: ImageRequest, kind: "Kind", max_length: int, output_type: str) -> Any:
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


@dataclass(frozen=True, slots=True)
class Kind:
    """One family and its test model.

    `true_scale` is the request's field that switches true guidance on, `silent` what `ask` assumes besides what all
    families share, `other_scale` a guidance scale that is not the silent one. `streams` makes what enters a block, and
    `costs` takes what `block_costs` needs for its sizes. Picture models have a diffusers `pipeline`. The blocks in
    `expert_blocks` wait for the device once a call, to learn how many tokens each expert gets.
    """

    model: str
    directory: str
    modality: str
    family: type[Family]
    adapter: Adapter
    request: Callable[..., GenerationRequest]
    transformer_file: str
    streams: Callable[[Any, int, torch.Generator], Streams]
    costs: tuple[int, ...]
    true_scale: str
    silent: Mapping[str, Any]
    other_scale: Mapping[str, Any]
    defaults: Mapping[str, Any]
    pipeline: type[DiffusionPipeline] | None = None
    expert_blocks: tuple[str, ...] = field(default=())

    def load_stock(self, directory: Path) -> Any:
        """The plain model, as if there were no engine; its denoiser is `transformer`."""
        if self.pipeline is None:
            return PlainHunyuan3D(directory)
        pipeline = self.pipeline.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def block_costs(self, family: Any) -> Mapping[str, BlockCost]:
        costs: Mapping[str, BlockCost] = family.block_costs(*self.costs)
        return costs

    def modules(self, family: Any) -> dict[str, nn.Module]:
        if self.pipeline is None:
            checkpoint = family.checkpoint
            return {"denoiser": checkpoint.denoiser, "vae": checkpoint.vae, "conditioner": checkpoint.conditioner}
        return {name: part for name, part in family.pipeline.components.items() if isinstance(part, nn.Module)}


KINDS = {
    "flux": Kind(
        model="tiny-flux",
        directory="tiny_flux",
        modality="image",
        family=FluxFamily,
        adapter=flux,
        request=ImageRequest,
        transformer_file=TRANSFORMER_FILE,
        streams=flux_streams,
        costs=(64, 96, 7),
        true_scale="true_cfg_scale",
        silent={"guidance_scale": 3.5},
        other_scale={"guidance_scale": 7.0},
        defaults={"num_inference_steps": 4, "guidance_scale": 2.5},
        pipeline=FluxPipeline,
    ),
    "qwen_image": Kind(
        model="tiny-qwen-image",
        directory="tiny_qwen_image",
        modality="image",
        family=QwenImageFamily,
        adapter=qwen_image,
        request=ImageRequest,
        transformer_file=TRANSFORMER_FILE,
        streams=qwen_image_streams,
        costs=(64, 96, 7),
        true_scale="guidance_scale",
        silent={"guidance_scale": 1.0},
        other_scale={"guidance_scale": 0.0},
        defaults={"num_inference_steps": 4, "guidance_scale": 2.5, "height": 64, "width": 80},
        pipeline=QwenImagePipeline,
    ),
    "hunyuan3d_plain": Kind(
        model="tiny-hunyuan3d",
        directory="tiny_plain_hunyuan3d",
        modality="mesh",
        family=Hunyuan3DFamily,
        adapter=plain_adapter,
        request=mesh_request,
        transformer_file=HUNYUAN3D_FILE,
        streams=plain_streams,
        costs=(5,),
        true_scale="guidance_scale",
        silent={"guidance_scale": 1.0},
        other_scale={"guidance_scale": 0.5},
        defaults={"num_inference_steps": 4, "guidance_scale": 2.5, "octree_resolution": 16},
        expert_blocks=("block.03", "block.04"),
    ),
    "hunyuan3d_stream": Kind(
        model="tiny-hunyuan3d",
        directory="tiny_stream_hunyuan3d",
        modality="mesh",
        family=Hunyuan3DFamily,
        adapter=stream_adapter,
        request=mesh_request,
        transformer_file=HUNYUAN3D_FILE,
        streams=double_streams,
        costs=(5,),
        true_scale="guidance_scale",
        silent={"guidance_scale": 1.0},
        other_scale={"guidance_scale": 0.0},
        defaults={"num_inference_steps": 4, "guidance_scale": 2.5, "octree_resolution": 16},
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
    blocks = kind.adapter.blocks(kind.load_stock(model_directory).transformer)
    rng = torch.Generator().manual_seed(3)
    orders = {
        mlp_name(name, part): torch.randperm(mlp.num_hidden, generator=rng)
        for name, block in blocks.items()
        for part, mlp in kind.adapter.mlps(block).items()
    }
    save_router_weights(RouterWeights(build_routers(len(blocks)), orders if permuted else {}), folder)
    write_curve(folder, CURVE, kind.family.quality_metric, {"prompts": 0})
    manifest = {
        "license": "apache-2.0",
        "defaults": kind.defaults,
        "sha256": {
            "router.safetensors": sha256(folder / "router.safetensors"),
            kind.transformer_file: sha256(model_directory / kind.transformer_file),
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
def tiny_plain_hunyuan3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model's folder like Hunyuan3D-2.1's."""
    directory = tmp_path_factory.mktemp("plain_hunyuan3d") / "tiny-hunyuan3d"
    save_plain_hunyuan3d(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_stream_hunyuan3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published model's folder like Hunyuan3D-2's."""
    directory = tmp_path_factory.mktemp("stream_hunyuan3d") / "tiny-hunyuan3d"
    save_stream_hunyuan3d(directory)
    return directory


@pytest.fixture(scope="session")
def model(kind: Kind) -> str:
    return kind.model


@pytest.fixture(scope="session")
def directory(request: pytest.FixtureRequest, kind: Kind) -> Path:
    """The family's model directory."""
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
def family(kind: Kind, directory: Path, router_weights: Path) -> Family:
    routers = load_router_weights(router_weights / kind.model, directory)
    return kind.family.load(directory, "cpu", torch.float32, routers, CheckpointTraits(), False)


@pytest.fixture(scope="session")
def open_engine(family: Family, engine: Engine) -> Engine:
    """An engine over `family`, for tests that look at its blocks."""
    return Engine({family.model_id: family}, engine.cards)


@pytest.fixture(scope="session")
def stock(kind: Kind, directory: Path) -> Any:
    return kind.load_stock(directory)


@pytest.fixture(scope="session")
def stock_result(kind: Kind) -> Callable[..., Any]:
    """What the plain model gives for a request: latents `(1, tokens, channels)`, or a list of one picture."""

    def stock_result(stock: Any, request: Any, engine: Engine, output_type: str = "latent") -> Any:
        if kind.pipeline is None:
            return stock.latents(request)
        return stock_picture(stock, request, kind, engine.max_sequence_length(request.model), output_type)

    return stock_result


@pytest.fixture(scope="session")
def streams_of(kind: Kind) -> Callable[..., Streams]:
    """What may enter a block, always the same."""

    def streams_of(family: Family, batch: int = 1) -> Streams:
        return kind.streams(family, batch, torch.Generator().manual_seed(0))

    return streams_of


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
        return kind.request(**{**silent, **kind.silent, **fields})

    return ask


@pytest.fixture(scope="session")
def guided(kind: Kind) -> Callable[..., dict[str, Any]]:
    """The fields of a request that switch true guidance on: two guidance branches."""

    def guided(negative_prompt: str = "a green triangle", scale: float = 2.0) -> dict[str, Any]:
        return {"negative_prompt": negative_prompt, kind.true_scale: scale}

    return guided


@pytest.fixture(scope="session")
def other_scale(kind: Kind) -> Mapping[str, Any]:
    """The fields of a request with another guidance scale than the silent one."""
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
