"""Hunyuan3D's published checkpoints: one `config.yaml` and one file with denoiser, shape VAE and conditioner."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from models.device import encoder_dtype
from models.diffusion.sampling import consistency_schedule, rising_flow_schedule
from models.errors import WeightsError
from models.families.hunyuan3d.conditioner import SingleImageEncoder
from models.families.hunyuan3d.layout import Part, find_config, part_of, read_config, weight_file
from models.families.hunyuan3d.plain_dit import HunYuanDiTPlain
from models.families.hunyuan3d.preparation import ImageSettings
from models.families.hunyuan3d.shape_vae import ShapeVAE, geometry_of
from models.families.hunyuan3d.stream_dit import Hunyuan3DDiT
from models.float8 import store_in_float8
from models.load_options import DEFAULTS, LoadOptions
from models.loading import TensorHead, misfit, read_heads, shapes_of, stream_tensors

Denoiser = HunYuanDiTPlain | Hunyuan3DDiT

_MODULES: Mapping[str, Mapping[str, type[nn.Module]]] = {
    # By the part's name, which is also the prefix of its tensors: the classes that it may have.
    "model": {"HunYuanDiTPlain": HunYuanDiTPlain, "Hunyuan3DDiT": Hunyuan3DDiT},
    "vae": {"ShapeVAE": ShapeVAE},
    "conditioner": {"SingleImageEncoder": SingleImageEncoder},
}
_CONSISTENCY = "ConsistencyFlowMatchEulerDiscreteScheduler"
_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", _CONSISTENCY)
# The second takes several views of one object. It prepares a front view alone as the first does.
_IMAGE_PROCESSORS = ("ImageProcessorV2", "MVImageProcessorV2")


@dataclass(frozen=True, slots=True)
class Hunyuan3DCheckpoint:
    """A loaded model directory. `schedule` gives the times of a number of steps, from 0 (noise) to 1 (data)."""

    denoiser: Denoiser
    vae: ShapeVAE
    conditioner: SingleImageEncoder
    image_settings: ImageSettings
    schedule: Callable[[int], Tensor]
    is_consistency_model: bool

    @property
    def has_guidance_embedding(self) -> bool:
        """Whether the guidance scale is an input of the denoiser: then guidance is distilled into it."""
        return isinstance(self.denoiser, Hunyuan3DDiT) and self.denoiser.guidance_in is not None


def load_checkpoint(
    directory: Path, device: str, dtype: torch.dtype, *, options: LoadOptions = DEFAULTS
) -> Hunyuan3DCheckpoint:
    """Load `config.yaml` and `model[.fp16].safetensors`, from `directory` or the one model's folder in it.

    Tensors go to the device one by one. Those of the VAE's encoder may be absent. Where the denoiser runs in bfloat16
    the VAE runs in float16: with 8 bits a field's surface is not where it belongs. A conditioner
    that `options` keep on the host is in `encoder_dtype`. Raises WeightsError if a file is missing or pickled, or if
    tensors are missing, surplus or misshapen, by name.
    """
    config_path = find_config(directory)
    if config_path is None:
        raise WeightsError(f"{directory} has no config.yaml of a Hunyuan3D denoiser, and no folder with one")
    file = weight_file(config_path.parent)
    config = read_config(config_path)
    image_settings = _image_settings_of(config, config_path)
    schedule, is_consistency_model = schedule_of(config, config_path)
    try:
        heads = read_heads([file])
        modules = build_modules(config, config_path, heads, file)
        if options.has_float8:
            store_in_float8(modules["model"])
            store_in_float8(modules["conditioner"])
        on_host = {"conditioner"} if options.offloads_text_encoders else set()
        on_host |= {"model"} if options.offloads_layers else set()  # `Family.keep_blocks_on_host` moves the rest
        vae_dtype = torch.float16 if dtype is torch.bfloat16 else dtype

        def place(name: str) -> tuple[str | torch.device, torch.dtype]:
            part = name.partition(".")[0]
            on = "cpu" if part in on_host else device
            if part == "vae":
                return on, vae_dtype
            return on, encoder_dtype(dtype) if part == "conditioner" and part in on_host else dtype

        stream_tensors(modules, [file], place, str(directory), copies=torch.device(device).type == "cpu")
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file} can't be loaded: {error}") from error
    modules.eval().requires_grad_(False)
    return Hunyuan3DCheckpoint(
        denoiser=cast(Denoiser, modules["model"]),
        vae=cast(ShapeVAE, modules["vae"]),
        conditioner=cast(SingleImageEncoder, modules["conditioner"]),
        image_settings=image_settings,
        schedule=schedule,
        is_consistency_model=is_consistency_model,
    )


def build_modules(
    config: Mapping[str, Any], config_path: Path, heads: Mapping[str, TensorHead], source: Path
) -> nn.ModuleDict:
    """Denoiser, VAE and conditioner on the meta device, named so that their tensors are those of a checkpoint.

    Raises WeightsError if their tensors are not those in `heads`, which are the tensors of the file `source`.
    """
    parts = {name: part_of(config, name, config_path) for name in _MODULES}
    vae_tensors = {
        name.removeprefix("vae."): torch.empty(head.shape, device="meta")
        for name, head in heads.items()
        if name.startswith("vae.")
    }
    if not vae_tensors:
        raise WeightsError(f"{source} has no tensor named vae.…, so it is not the file of a whole model")
    try:
        parts["vae"] = parts["vae"]._replace(params={**parts["vae"].params, **geometry_of(vae_tensors)})
    except WeightsError as error:
        raise WeightsError(f"{source}, under vae.: {error}") from error
    with torch.device("meta"):
        modules = nn.ModuleDict({name: _build(name, part, config_path) for name, part in parts.items()})
    if fault := misfit(shapes_of(modules), heads):
        raise WeightsError(f"{source} does not fit {config_path}: {fault}")
    return modules


def _build(name: str, part: Part, config_path: Path) -> nn.Module:
    """Ignores settings that the class does not know: published files have several that have no effect."""
    classes = _MODULES[name]
    if part.class_name not in classes:
        raise WeightsError(f"{config_path}: {name} is of class {part.class_name}; known: {', '.join(classes)}")
    cls = classes[part.class_name]
    known = inspect.signature(cls).parameters
    try:
        return cls(**{key: value for key, value in part.params.items() if key in known})
    except WeightsError as error:
        raise WeightsError(f"{config_path}: {name}: {error}") from error
    except (ArithmeticError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(f"{config_path}: {name} can't be built of its params: {error!r}") from error


def _image_settings_of(config: Mapping[str, Any], path: Path) -> ImageSettings:
    part = part_of(config, "image_processor", path)
    if part.class_name not in _IMAGE_PROCESSORS:
        known = ", ".join(_IMAGE_PROCESSORS)
        raise WeightsError(f"{path}: image_processor is of class {part.class_name}; known: {known}")
    known_settings = ImageSettings.__dataclass_fields__
    return ImageSettings(**{key: value for key, value in part.params.items() if key in known_settings})


def schedule_of(config: Mapping[str, Any], path: Path) -> tuple[Callable[[int], Tensor], bool]:
    """The times of a number of steps, and whether the model is a consistency model, distilled to few steps."""
    part = part_of(config, "scheduler", path)
    if part.class_name not in _SCHEDULERS:
        raise WeightsError(f"{path}: scheduler is of class {part.class_name}; known: {', '.join(_SCHEDULERS)}")
    if part.class_name == _CONSISTENCY:
        pcm_timesteps = int(part.params.get("pcm_timesteps", 50))
        return lambda num_inference_steps: consistency_schedule(num_inference_steps, pcm_timesteps), True
    shift = float(part.params.get("shift", 1.0))
    return lambda num_inference_steps: rising_flow_schedule(num_inference_steps, shift), False
