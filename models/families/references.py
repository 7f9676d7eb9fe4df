"""What the families made for editing share: pictures that the transformer reads beside the noise.

The pictures' latents follow the noise in the image stream at every step, so blocks, routers and the compute account see
them as image tokens: a router's mean is over both. Velocities are cut to the noise before guidance, as in the stock
pipelines.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from typing import ClassVar

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from models.card import ImageCard, ModelCard, PictureSizes
from models.elastic.streams import Streams
from models.errors import InvalidRequest
from models.families.editing import opened_picture
from models.families.image import ImageFamily
from models.request import ImageEdit, ImageRequest
from models.state import DenoiseState, References
from models.weights import Manifest


class EditingFamily(ImageFamily):
    """One loaded model made for editing: a picture may be needed, and is neither noised nor masked.

    One side of a picture may be `max_ratio` times as long as the other.
    """

    max_input_images: ClassVar[int] = 1
    needs_input_image: ClassVar[bool] = True
    max_ratio: ClassVar[float] = math.inf

    @property
    @abstractmethod
    def picture_sizes(self) -> PictureSizes:
        """The sizes at which the transformer reads pictures."""

    def card(self, basics: ModelCard, manifest: Manifest) -> ImageCard:
        return replace(
            super().card(basics, manifest),
            max_input_images=self.max_input_images,
            needs_input_image=self.needs_input_image,
            picture_sizes=self.picture_sizes,
        )

    def example_request(self, card: ModelCard) -> ImageRequest:
        """An edit of a single picture."""
        request, file = super().example_request(card), BytesIO()
        Image.new("RGB", (request.width, request.height)).save(file, "PNG")
        return replace(request, edit=ImageEdit((file.getvalue(),)))

    def _read_pictures(self, request: ImageRequest) -> tuple[Sequence[Image.Image], References | None]:
        pictures = [opened_picture(file) for file in (request.edit.images if request.edit else ())]
        for width, height in (picture.size for picture in pictures):
            if max(width, height) > self.max_ratio * min(width, height):
                raise InvalidRequest(
                    f"image has {width}x{height} pixels; {self.model_id} reads pictures whose one side is at most "
                    f"{self.max_ratio} times as long as the other",
                    "image",
                )
        return pictures, self._references(pictures)

    def _references(self, pictures: Sequence[Image.Image]) -> References | None:
        parts, sizes = [], []
        for picture in pictures:
            width, height = self.picture_sizes.of(*picture.size)
            pixels = self._image_processor.preprocess(picture, height, width)
            with self._encoding:
                encoded = self._encode_picture(pixels)
            rows, columns = encoded.shape[-2:]
            num_channels = self.transformer.config.in_channels // 4
            parts.append(self.pipeline._pack_latents(encoded, 1, num_channels, rows, columns))
            sizes.append((rows // 2, columns // 2))
        return References(torch.cat(parts, dim=1), tuple(sizes)) if parts else None

    @property
    def _image_processor(self) -> VaeImageProcessor:
        processor: VaeImageProcessor = self.pipeline.image_processor
        return processor

    def _encode_picture(self, pixels: Tensor) -> Tensor:
        """Latents `(1, channels, [1 frame,] rows, columns)` of `pixels` `(1, 3, height, width)` in [-1, 1]."""
        vae = self.pipeline.vae
        latents: Tensor = self.pipeline._encode_vae_image(pixels.to(vae.device, vae.dtype), generator=None)
        return latents

    def _draw_latents(self, request: ImageRequest) -> Tensor:
        transformer = self.transformer
        latents: Tensor = self.pipeline.prepare_latents(
            None,  # no pictures, which are encoded once for all branches
            1,
            transformer.config.in_channels // 4,
            request.height,
            request.width,
            transformer.dtype,
            transformer.device,
            torch.Generator().manual_seed(request.seed),
        )[0]
        return latents

    def _latents_and_times(self, states: Sequence[DenoiseState]) -> tuple[Tensor, Tensor]:
        """Latents and those of the pictures beside them, `(rows, image tokens, channels)`, and the timesteps."""
        latents, times = super()._latents_and_times(states)
        parts = [part.references.latents for state in states for part in state.inputs if part.references]
        return (torch.cat((latents, torch.cat(parts)), dim=1) if parts else latents), times

    def epilogue(self, states: Sequence[DenoiseState], streams: Streams) -> Tensor:
        return super().epilogue(states, streams)[:, : states[0].latents.shape[1]]
