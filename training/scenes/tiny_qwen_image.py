"""Trains tiny-qwen-image from scratch: `python -m training.scenes.tiny_qwen_image` (see `training.stages`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from training import stages
from training.scenes.backbones import QwenImageBackbone, build_qwen_image
from training.scenes.recipe import ImageRecipe
from training.scenes.text import QwenImageConditioner
from training.scenes.vae import ImageVae, qwen_image_vae, wrap_qwen_image_vae


class TinyQwenImage:
    """A `training.scenes.recipe.ImageModel`."""

    name = "tiny-qwen-image"
    module = "training.scenes.tiny_qwen_image"
    text_steps = 700
    base_steps = 2000
    defaults: Mapping[str, float] = {"num_inference_steps": 20, "guidance_scale": 3.0, "height": 128, "width": 128}
    encoders: Sequence[str] = ("text_encoder",)

    def new_vae(self) -> ImageVae:
        return qwen_image_vae()

    def load_vae(self, folder: Path) -> ImageVae:
        return wrap_qwen_image_vae(AutoencoderKLQwenImage.from_pretrained(folder))

    def new_conditioner(self) -> QwenImageConditioner:
        return QwenImageConditioner.new()

    def load_conditioner(self, checkpoint: Path) -> QwenImageConditioner:
        return QwenImageConditioner.load(checkpoint)

    def new_backbone(self) -> QwenImageBackbone:
        return QwenImageBackbone(build_qwen_image())

    def load_backbone(self, folder: Path) -> QwenImageBackbone:
        return QwenImageBackbone(QwenImageTransformer2DModel.from_pretrained(folder, dtype=torch.float32))

    def pipeline(
        self,
        vae: AutoencoderKLQwenImage,
        conditioner: QwenImageConditioner,
        transformer: QwenImageTransformer2DModel,
    ) -> QwenImagePipeline:
        return QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae,
            text_encoder=conditioner.encoder,
            tokenizer=conditioner.tokenizer,
            transformer=transformer,
        )


if __name__ == "__main__":
    stages.main(ImageRecipe(TinyQwenImage()))
