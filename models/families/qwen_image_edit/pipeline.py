"""Qwen-Image-Edit: Qwen-Image that reads pictures, both in its text encoder and beside the noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from torch import Tensor
from transformers import Qwen2VLProcessor

from models.card import PictureSizes
from models.errors import InvalidRequest
from models.families.image import Branch
from models.families.qwen_image.pipeline import QwenImageFamily
from models.families.references import EditingFamily
from models.memory import ImageMemory
from models.state import BranchInputs


class PictureProcessor(Qwen2VLProcessor):  # type: ignore[misc]  # transformers has no types
    """The processor of pictures and prompts without its part for videos, which would need torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None) -> None:
        super().__init__(image_processor, tokenizer)


class QwenImageEditFamily(EditingFamily, QwenImageFamily):
    pipeline_class = QwenImageEditPipeline
    encoder_sees_pictures: ClassVar[bool] = True
    max_ratio: ClassVar[float] = 100  # Qwen2.5-VL's image processor takes up to 200, after sides are rounded
    loaders: ClassVar[Mapping[str, Callable[[Path], Any]]] = {"processor": PictureProcessor.from_pretrained}
    unused: ClassVar[Sequence[str]] = ("text_encoder.lm_head",)

    @property
    def picture_sizes(self) -> PictureSizes:
        """QwenImageEditPipeline has the same area as a literal."""
        return PictureSizes(area=pipeline_qwenimage_edit_plus.VAE_IMAGE_SIZE)

    def _encode(self, branch: Branch, pictures: Sequence[Image.Image]) -> BranchInputs:
        processor = self.pipeline.processor
        for token in (processor.image_token, processor.video_token):
            if token in branch.prompt:
                raise InvalidRequest(
                    f"{branch.param} has {token}, which stands for an input image or video; leave it out", branch.param
                )
        return super()._encode(branch, pictures)

    @property
    def seen_sizes(self) -> PictureSizes:
        """The sizes at which the text encoder sees pictures."""
        return self.picture_sizes

    def memory(self) -> ImageMemory:
        processor = self.pipeline.processor.image_processor
        seen = self.seen_sizes.num_pixels / (processor.patch_size * processor.merge_size) ** 2
        return replace(super().memory(), picture_text_tokens=math.ceil(1.05 * seen))  # sides are rounded

    def _seen(self, pictures: Sequence[Image.Image]) -> Mapping[str, Any]:
        [picture] = pictures
        return {"image": self._resized(picture, self.seen_sizes)}

    def _encode_picture(self, pixels: Tensor) -> Tensor:
        return super()._encode_picture(pixels.unsqueeze(2))

    def _resized(self, picture: Image.Image, sizes: PictureSizes) -> Image.Image:
        width, height = sizes.of(*picture.size)
        resized = self._image_processor.resize(picture, height, width)
        assert isinstance(resized, Image.Image)
        return resized


class QwenImageEditPlusFamily(QwenImageEditFamily):
    pipeline_class = QwenImageEditPlusPipeline
    max_input_images: ClassVar[int] = 3
    """As in the model card of Qwen-Image-Edit-2509: it works best with one to three."""

    @property
    def seen_sizes(self) -> PictureSizes:
        return PictureSizes(area=pipeline_qwenimage_edit_plus.CONDITION_IMAGE_SIZE)

    def _seen(self, pictures: Sequence[Image.Image]) -> Mapping[str, Any]:
        return {"image": [self._resized(picture, self.seen_sizes) for picture in pictures]}
