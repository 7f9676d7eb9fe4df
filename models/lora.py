"""Low-rank adapters (LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685), fused into a pipeline's weights."""

import warnings
from collections.abc import Mapping
from typing import Any

from diffusers import DiffusionPipeline
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError

from models.diffusers_directory import some
from models.errors import WeightsError
from models.load_options import Lora

_UNFIT = (OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError, SafetensorError)


def fuse_loras(pipeline: DiffusionPipeline, loras: Mapping[str, Lora]) -> None:
    """Add the adapters, by their names, to the weights of `pipeline`, each times its scale.

    The result is that of diffusers' `load_lora_weights`, `set_adapters` and `fuse_lora`. Raises WeightsError, naming
    the file, if one can't be read or does not fit the model.
    """
    adapted: Any = pipeline
    for name, lora in loras.items():
        try:
            _load(adapted, name, lora)
        except _UNFIT as error:
            reason = " ".join(str(error).split())  # PyTorch's takes several lines
            raise WeightsError(f"{lora.file} can't be used as an adapter of this model: {reason}") from error
    adapted.set_adapters([*loras], [lora.scale for lora in loras.values()])
    # By default, diffusers leaves adapters of FLUX's text encoder unfused.
    parts = [part for part in adapted._lora_loadable_modules if hasattr(getattr(adapted, part), "peft_config")]
    adapted.fuse_lora(parts, adapter_names=[*loras], safe_fusing=True)
    adapted.unload_lora_weights()


def _load(pipeline: Any, name: str, lora: Lora) -> None:
    """diffusers only warns of tensors that it has no place for. Here they are an error."""
    source = {"weight_name": lora.file.name, "local_files_only": True, "use_safetensors": True}
    folder, num_channels = str(lora.file.parent), pipeline.transformer.config.in_channels
    wanted = {key for key in pipeline.lora_state_dict(folder, **source) if not key.endswith(".alpha")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of the adapter before
        pipeline.load_lora_weights(folder, adapter_name=name, **source)
    if pipeline.transformer.config.in_channels != num_channels:
        raise ValueError("it is for another number of channels, as adapters for control images are")
    loaded = {
        f"{part}.{key}"
        for part in pipeline._lora_loadable_modules
        if name in getattr(getattr(pipeline, part), "peft_config", {})
        for key in get_peft_model_state_dict(getattr(pipeline, part), adapter_name=name)
    }
    # Since version 5, transformers' CLIP has no text_model.
    if left_out := sorted(key for key in wanted if key.replace(".text_model.", ".") not in loaded):
        raise ValueError(f"the model has no place for {some(left_out)}")
