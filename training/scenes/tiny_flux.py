"""Trains tiny-flux from scratch: `python -m training.scenes.tiny_flux` (see `training.stages`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from training import stages
from training.scenes.backbones import FluxBackbone, build_flux
from training.scenes.recipe import ImageRecipe
from training.scenes.text import FluxConditioner
from training.scenes.vae import ImageVae, flux_vae, wrap_flux_vae


class TinyFlux:
    """A `training.scenes.recipe.ImageModel`."""

    name = "tiny-flux"
    module = "training.scenes.tiny_flux"
    text_steps = 1200
    base_steps = 2300
    defaults: Mapping[str, float] = {"num_inference_steps": 20, "guidance_scale": 3.0}
    encoders: Sequence[str] = ("text_encoder", "text_encoder_2")

    def new_vae(self) -> ImageVae:
        return flux_vae()

    def load_vae(self, folder: Path) -> ImageVae:
        return wrap_flux_vae(AutoencoderKL.from_pretrained(folder))

    def new_conditioner(self) -> FluxConditioner:
        return FluxConditioner.new()

    def load_conditioner(self, checkpoint: Path) -> FluxConditioner:
        return FluxConditioner.load(checkpoint)

    def new_backbone(self) -> FluxBackbone:
        return FluxBackbone(build_flux())

    def load_backbone(self, folder: Path) -> FluxBackbone:
        return FluxBackbone(FluxTransformer2DModel.from_pretrained(folder, dtype=torch.float32))

    def pipeline(
        self, vae: AutoencoderKL, conditioner: FluxConditioner, transformer: FluxTransformer2DModel
    ) -> FluxPipeline:
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=conditioner.clip,
            tokenizer=conditioner.clip_tokenizer,
            text_encoder_2=conditioner.t5,
            tokenizer_2=conditioner.t5_tokenizer,
            transformer=transformer,
        )


if __name__ == "__main__":
    stages.main(ImageRecipe(TinyFlux()))
