"""Model directories in the sizes that are published, with weights that take no space on the disk: they are all zero."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from models.families.hunyuan3d.conditioner import SingleImageEncoder
from models.families.hunyuan3d.plain_dit import HunYuanDiTPlain
from models.families.hunyuan3d.shape_vae import ShapeVAE
from models.families.hunyuan3d.stream_dit import Hunyuan3DDiT
from tests.fixtures.tiny_flux import build_flux_text
from tests.fixtures.tiny_qwen_image import build_qwen_tokenizer

_SAFETENSORS_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}


@dataclass(frozen=True, slots=True)
class Depth:
    """How many layers parts have at most. What is on the host may have few: its bytes do not count."""

    text_encoder: int = 100
    blocks: int = 100


FULL = Depth()


def flux_dev(directory: Path, depth: Depth = FULL) -> None:
    blocks = {"num_layers": min(19, depth.blocks), "num_single_layers": min(38, depth.blocks)}
    transformer = _empty(lambda: FluxTransformer2DModel(guidance_embeds=True, **blocks))
    vae = _empty(
        lambda: AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=16,
            sample_size=1024,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )
    t5_tokenizer, _, clip_tokenizer, _ = build_flux_text()
    t5_tokenizer.model_max_length, clip_tokenizer.model_max_length = 512, 77
    t5 = T5Config(
        d_model=4096,
        d_ff=10240,
        num_heads=64,
        d_kv=64,
        num_layers=min(24, depth.text_encoder),
        vocab_size=32128,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    clip = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=49408,
        eos_token_id=clip_tokenizer.eos_token_id,
    )
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        "transformer": transformer,
        "vae": vae,
        "text_encoder": _empty(lambda: CLIPTextModel(clip)),
        "tokenizer": clip_tokenizer,
        "text_encoder_2": _empty(lambda: T5EncoderModel(t5)),
        "tokenizer_2": t5_tokenizer,
    }
    _save(directory, "FluxPipeline", parts)


def qwen_image(directory: Path, depth: Depth = FULL) -> None:
    tokenizer = build_qwen_tokenizer()
    tokenizer.model_max_length = 131072
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": min(28, depth.text_encoder),
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={"hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
    )
    parts = {
        "scheduler": FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_image_seq_len=256,
            max_image_seq_len=8192,
            max_shift=0.9,
            shift_terminal=0.02,
        ),
        "transformer": _empty(
            lambda: QwenImageTransformer2DModel(joint_attention_dim=3584, num_layers=min(60, depth.blocks))
        ),
        "vae": _empty(lambda: AutoencoderKLQwenImage()),
        "text_encoder": _empty(lambda: Qwen2_5_VLForConditionalGeneration(config)),
        "tokenizer": tokenizer,
    }
    _save(directory, "QwenImagePipeline", parts)


def hunyuan3d_2_1(directory: Path, depth: Depth = FULL) -> None:
    params = {
        "in_channels": 64,
        "hidden_size": 2048,
        "context_dim": 1024,
        "depth": 21,
        "num_heads": 16,
        "num_moe_layers": 6,
        "num_experts": 8,
        "moe_top_k": 2,
        "qkv_bias": False,
        "qk_norm": True,
    }
    dino = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
    _save_hunyuan3d(directory, HunYuanDiTPlain, params, dino, {"num_latents": 4096, "point_feats": 4})


def hunyuan3d_2_0(directory: Path, depth: Depth = FULL) -> None:
    params = {
        "in_channels": 64,
        "context_in_dim": 1536,
        "hidden_size": 1024,
        "mlp_ratio": 4.0,
        "num_heads": 16,
        "depth": 16,
        "depth_single_blocks": 32,
        "qkv_bias": True,
    }
    dino = {"hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "use_swiglu_ffn": True}
    _save_hunyuan3d(directory, Hunyuan3DDiT, params, dino, {"num_latents": 3072, "with_encoder": False})


DIRECTORIES: Mapping[str, Callable[[Path, Depth], None]] = {
    "flux-dev": flux_dev,
    "qwen-image": qwen_image,
    "hunyuan3d-2.1": hunyuan3d_2_1,
    "hunyuan3d-2.0": hunyuan3d_2_0,
}
"""What writes each model's directory."""


def _save_hunyuan3d(
    directory: Path,
    denoiser: type[nn.Module],
    params: Mapping[str, Any],
    dino: Mapping[str, Any],
    vae: Mapping[str, Any],
) -> None:
    shape_vae = {
        "embed_dim": 64,
        "width": 1024,
        "heads": 16,
        "num_decoder_layers": 16,
        "include_pi": False,
        "qkv_bias": False,
        "qk_norm": True,
        **vae,
    }
    config = {**dino, "image_size": 518, "patch_size": 14}
    conditioner = {"main_image_encoder": {"type": "DinoImageEncoder", "kwargs": {"config": config, "image_size": 518}}}
    modules: dict[str, tuple[Any, Mapping[str, Any]]] = {
        "model": (denoiser, params),
        "vae": (ShapeVAE, shape_vae),
        "conditioner": (SingleImageEncoder, conditioner),
    }
    settings = {
        "scheduler": ("FlowMatchEulerDiscreteScheduler", {}),
        "image_processor": ("ImageProcessorV2", {"size": 512, "border_ratio": 0.15}),
    }
    directory.mkdir()
    entries = {name: (cls.__name__, values) for name, (cls, values) in modules.items()} | settings
    config_file = {
        name: {"target": f"published.{cls}", "params": dict(values)} for name, (cls, values) in entries.items()
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config_file))
    whole = _empty(lambda: nn.ModuleDict({name: cls(**values) for name, (cls, values) in modules.items()}))
    _write_zeros(directory, "model.fp16", whole, math.inf)
    (directory / "model.fp16-1.safetensors").rename(directory / "model.fp16.safetensors")


def _save(directory: Path, class_name: str, parts: Mapping[str, Any]) -> None:
    directory.mkdir()
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": "0.35.0"}
    for name, part in parts.items():
        library = "diffusers" if type(part).__module__.startswith("diffusers") else "transformers"
        index[name] = [library, type(part).__name__]
        folder = directory / name
        if not hasattr(part, "state_dict"):
            part.save_pretrained(folder)
            continue
        folder.mkdir()
        if library == "diffusers":
            part.save_config(folder)
        else:
            part.config.save_pretrained(folder)
        _write_zeros(folder, "diffusion_pytorch_model" if library == "diffusers" else "model", part)
    (directory / "model_index.json").write_text(json.dumps(index))


def _empty(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def _write_zeros(folder: Path, stem: str, module: nn.Module, shard_bytes: float = 2**31) -> None:
    """Safetensors files whose data are holes, with an index. A file of tens of GB could not be mapped everywhere."""
    shards: list[dict[str, Any]] = [{}]
    end, seen, places = 0, set(), {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # shared weights are saved once
            continue
        seen.add(id(tensor))
        # As the models compute, since a conversion would read all the zeros. Shape VAEs compute in float16.
        computes_in = torch.float16 if name.startswith("vae.") else torch.bfloat16
        kind = computes_in if tensor.dtype.is_floating_point else tensor.dtype
        if end > shard_bytes:
            shards, end = [*shards, {}], 0
        start, end = end, end + tensor.numel() * kind.itemsize
        shards[-1][name] = {
            "dtype": _SAFETENSORS_TYPES[kind],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        places[name] = f"{stem}-{len(shards)}.safetensors"
    for number, shard in enumerate(shards, 1):
        _write_hole(folder / f"{stem}-{number}.safetensors", shard)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _write_hole(file: Path, entries: Mapping[str, Any]) -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in entries.values()))
