"""What the text-to-image families share: prompts, noise, position factors and pixels."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from threading import Lock
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from models.card import ImageCard, ModelCard, SizeLimits, basics_of
from models.curve import EXACT, Preset
from models.diffusion.sampling import flow_schedule
from models.elastic.compute import BlockCost
from models.families import tiling
from models.families.editing import NoisedPicture, noised_picture, with_kept_pixels
from models.families.family import Beginning, BranchStart, Family
from models.families.preview import apply_colour_map, fit_colour_map, fitting_images
from models.memory import ImageMemory, Values
from models.prompt_cache import PromptCache
from models.request import GenerationRequest, ImageRequest, PresetBudget
from models.state import BranchInputs, DenoiseState, References
from models.weights import Manifest, RouterWeights


class Branch(NamedTuple):
    """One guidance branch: its name in traces, its prompt, and the request's field with that prompt."""

    name: str
    prompt: str
    param: str


class ImageFamily(Family):
    """One loaded text-to-image model. Subclasses call the code of their diffusers pipeline, piece by piece.

    `inpaint_pipeline` is that pipeline's sibling for edits. `encoder_sees_pictures` says whether an embedded prompt
    depends on the pictures too. With a `prompt_cache` prompts are encoded once. `step_values` says how much a step
    holds at its peak.
    """

    quality_metric: ClassVar[str] = "ssim"
    joins_branches: ClassVar[bool] = False
    inpaint_pipeline: ClassVar[type[DiffusionPipeline]]
    encoder_sees_pictures: ClassVar[bool] = False
    step_values: ClassVar[tuple[Values, ...]]

    def __init__(self, model_id: str, pipeline: DiffusionPipeline, router_weights: RouterWeights | None) -> None:
        self.pipeline: Any = pipeline
        super().__init__(model_id, self.pipeline.transformer, router_weights)
        self.prompt_cache: PromptCache | None = None
        self._rotary: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        # Qwen-Image's VAE keeps the state of its encoder; two threads encode, for edits and for the first preview.
        self._encoding = Lock()

    @cached_property
    def _inpaint(self) -> Any:
        return self.inpaint_pipeline(**self.pipeline.components)

    @property
    def encodes_on_device(self) -> bool:
        return bool(self.pipeline.text_encoder.device == self.device)

    @property
    @abstractmethod
    def default_side(self) -> int:
        """The stock pipeline's default height and width in pixels."""

    @property
    @abstractmethod
    def max_sequence_length(self) -> int:
        """How many tokens of a prompt the transformer reads at most."""

    @abstractmethod
    def block_costs(
        self, height: int, width: int, num_text_tokens: int, num_reference_tokens: int = 0
    ) -> Mapping[str, BlockCost]:
        """Floating-point operations of one row in every block, for an image of `height` x `width` pixels.

        `num_reference_tokens` counts those of pictures that the transformer reads beside the noise.
        """

    @property
    @abstractmethod
    def _values_per_pixel(self) -> tuple[int, int]:
        """How many numbers the VAE holds at its peak for each pixel, to encode and to decode an image."""

    @abstractmethod
    def _branches(self, request: ImageRequest) -> Sequence[Branch]:
        """The guidance branches, the conditional one first."""

    @abstractmethod
    def _encode(self, branch: Branch, pictures: Sequence[Image.Image]) -> BranchInputs:
        """The inputs of a branch that follow from its prompt; some text encoders look at `pictures` too.

        Raises InvalidRequest if the prompt has too many tokens.
        """

    @abstractmethod
    def _rotary_factors(
        self, num_text_tokens: int, height: int, width: int, references: Sequence[tuple[int, int]] = ()
    ) -> tuple[Tensor, Tensor]:
        """Position factors as the transformer takes them.

        `height` and `width` are in tokens, and so are those in `references`, of the pictures beside the noise.
        """

    @abstractmethod
    def _encode_images(self, images: Tensor) -> Tensor:
        """Latents `(images, channels, rows, columns)`, scaled for the transformer, without the encoder's noise.

        `images` is `(images, 3, height, width)` in [-1, 1], on the VAE's device and in its type.
        """

    @abstractmethod
    def decode(self, state: DenoiseState) -> NDArray[np.uint8]: ...

    @property
    def pixels_per_token(self) -> int:
        """Heights and widths of images are multiples of this."""
        return int(self.pipeline.vae_scale_factor) * 2

    def card(self, basics: ModelCard, manifest: Manifest) -> ImageCard:
        height, width = manifest.height or self.default_side, manifest.width or self.default_side
        return ImageCard(
            **basics_of(basics),
            default_height=height,
            default_width=width,
            sizes=SizeLimits(self.pixels_per_token, 4 * self.pixels_per_token, 2 * max(height, width)),
            max_prompt_characters=16 * self.max_sequence_length,  # a quick check before tokens are counted
        )

    @property
    def modules(self) -> list[nn.Module]:
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    def memory(self) -> ImageMemory:
        transformer, vae = self.transformer, self.pipeline.vae
        element_bytes = transformer.dtype.itemsize
        encode, decode = self._values_per_pixel
        return ImageMemory(
            weights=self.weight_bytes(),
            num_blocks=len(self.blocks),
            token_bytes=self.adapter.channels(transformer) * element_bytes,
            latent_bytes=transformer.config.in_channels * element_bytes,
            step_values=self.step_values,
            joins_branches=self.joins_branches,
            position_bytes=8 * transformer.config.attention_head_dim,  # a cosine and a sine in float32
            pixels_per_token=self.pixels_per_token,
            max_text_tokens=self.max_sequence_length,
            pads_prompts=True,
            encode_token_bytes=max(self._text_encoder_bytes(), default=0),
            encode_pixel_bytes=encode * vae.dtype.itemsize,
            decode_pixel_bytes=decode * vae.dtype.itemsize,
        )

    def _text_encoder_bytes(self) -> Iterator[int]:
        """Bytes that each text encoder on the transformer's device takes for a token: all layers' outputs, and more."""
        for name, encoder in self.pipeline.components.items():
            if name.startswith("text_encoder") and encoder.device == self.device:
                config = encoder.config.get_text_config()
                hidden = config.d_ff if hasattr(config, "d_ff") else config.intermediate_size
                logits = 0 if encoder.get_output_embeddings() is None else config.vocab_size
                values = config.hidden_size * (config.num_hidden_layers + 1) + 4 * hidden + logits
                yield values * encoder.dtype.itemsize

    def example_request(self, card: ModelCard) -> ImageRequest:
        assert isinstance(card, ImageCard)
        return ImageRequest(
            model=card.id,
            prompt="",
            height=card.default_height,
            width=card.default_width,
            num_inference_steps=card.default_num_inference_steps,
            guidance_scale=card.default_guidance_scale,
            seed=0,
            budget=PresetBudget(Preset.EXACT),
            point=EXACT,
            is_guided=card.is_guided(card.default_guidance_scale),
        )

    def encode(self, request: GenerationRequest) -> Sequence[BranchStart]:
        assert isinstance(request, ImageRequest)
        pictures, references = self._read_pictures(request)
        return [self._start_branch(branch, request, pictures, references) for branch in self._branches(request)]

    def _read_pictures(self, request: ImageRequest) -> tuple[Sequence[Image.Image], References | None]:
        """The pictures that the model reads beside the noise, and their latents."""
        return (), None

    def _start_branch(
        self,
        branch: Branch,
        request: ImageRequest,
        pictures: Sequence[Image.Image],
        references: References | None,
    ) -> BranchStart:
        was_cached = None
        if self.prompt_cache is None or self.encoder_sees_pictures:
            embedded = self._encode(branch, pictures)
        else:
            embedded, was_cached = self.prompt_cache.look_up(
                self.model_id, branch.prompt, lambda: self._encode(branch, pictures)
            )
            embedded = embedded.on(self.device)
        inputs = replace(embedded, guidance=self._guidance(request), references=references)
        return BranchStart(branch.name, inputs, self._costs(request, inputs), was_cached)

    def _guidance(self, request: ImageRequest) -> Tensor | None:
        """The guidance scale as the time embedding takes it, `(1,)`, if it does."""
        return None

    def begin(self, request: GenerationRequest, branches: Sequence[BranchStart]) -> Beginning:
        assert isinstance(request, ImageRequest)
        inputs, noised = branches[0].inputs, self._noised(request)
        # A picture with noise on has the size of the result.
        pictures = inputs.references.latents if inputs.references else noised.latents
        return Beginning(
            (request.height, request.width, *_reference_sizes(inputs)),
            *noised,
            num_picture_tokens=pictures.shape[1] if request.edit else 0,
        )

    def _costs(self, request: ImageRequest, inputs: BranchInputs) -> Mapping[str, BlockCost]:
        num_reference_tokens = sum(height * width for height, width in _reference_sizes(inputs))
        return self.block_costs(request.height, request.width, inputs.num_text_tokens, num_reference_tokens)

    def _noised(self, request: ImageRequest) -> NoisedPicture:
        """The latents and the schedule of `request`: of noise alone, or of the picture to edit."""
        num_tokens = request.height // self.pixels_per_token * (request.width // self.pixels_per_token)
        sigmas, timesteps = flow_schedule(self.pipeline.scheduler, request.num_inference_steps, num_tokens)
        if request.edit is None or request.edit.strength is None:
            return NoisedPicture(self._draw_latents(request), sigmas, timesteps, None)
        with self._encoding:
            inpaint = self.inpaint_pipeline(**{**self.pipeline.components, "vae": self._vae_for(request)})
            return noised_picture(inpaint, request, self.transformer.dtype, self.transformer.device)

    @torch.inference_mode()
    def preview(self, request: GenerationRequest, prediction: Tensor) -> NDArray[np.uint8]:
        """One pixel for each latent pixel, `(rows, columns, 3)`. The first call fits their colours, with the VAE."""
        latents = self._unpacked(prediction, request)
        # Drops the frame axis of a video VAE, which has one frame.
        return apply_colour_map(self._colour_map, latents.view(-1, *latents.shape[-2:]))

    @cached_property
    def _colour_map(self) -> Tensor:
        images, vae = fitting_images(), self.pipeline.vae
        with self._encoding:
            latents = self._encode_images(images.to(vae.device, vae.dtype))
        return fit_colour_map(latents, images)

    def quality_sample(self, state: DenoiseState) -> NDArray[np.uint8]:
        return self.decode(state)

    def similarity(self, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
        """SSIM (Wang et al. 2004) of two uint8 images, as scikit-image computes it by default.

        Uniform window of 7 x 7 pixels, sample covariance, data range 255; the mean over the three channels and over all
        pixels but a border of 3.
        """
        return float(structural_similarity(a, b, channel_axis=2, data_range=255))

    def _draw_latents(self, request: ImageRequest) -> Tensor:
        """The noise that the stock pipeline draws, packed, `(1, tokens, channels)`."""
        transformer = self.transformer
        drawn = self.pipeline.prepare_latents(
            1,
            transformer.config.in_channels // 4,
            request.height,
            request.width,
            transformer.dtype,
            transformer.device,
            torch.Generator().manual_seed(request.seed),
        )
        # FLUX's pipeline also returns the positions of its tokens.
        latents: Tensor = drawn[0] if isinstance(drawn, tuple) else drawn
        return latents

    def _vae_for(self, request: GenerationRequest) -> Any:
        """The autoencoder, for a picture of this size."""
        assert isinstance(request, ImageRequest)
        return tiling.for_size(self.pipeline.vae, request.height, request.width, self.pipeline.vae_scale_factor)

    def _unpacked(self, latents: Tensor, request: GenerationRequest) -> Tensor:
        """Latents in the VAE's order, still scaled for the transformer: `(1, channels, [1 frame,] rows, columns)`."""
        assert isinstance(request, ImageRequest)
        unpacked: Tensor = self.pipeline._unpack_latents(
            latents, request.height, request.width, self.pipeline.vae_scale_factor
        )
        return unpacked

    def _rotary_embedding(self, states: Sequence[DenoiseState], num_text_tokens: int) -> tuple[Tensor, Tensor]:
        request = states[0].request
        assert isinstance(request, ImageRequest)
        height, width = request.height // self.pixels_per_token, request.width // self.pixels_per_token
        key = (num_text_tokens, height, width, _reference_sizes(states[0].inputs[0]))
        if key not in self._rotary:
            if len(self._rotary) == 64:  # few sizes and prompt lengths are in use at a time
                self._rotary.clear()
            self._rotary[key] = self._rotary_factors(*key)
        return self._rotary[key]

    def _pixels(self, image: Tensor, request: GenerationRequest) -> NDArray[np.uint8]:
        """Pixels of a decoded image `(1, 3, height, width)` in [-1, 1], rounded as in the stock pipeline.

        Pixels that an edit keeps are those of its picture.
        """
        assert isinstance(request, ImageRequest)
        values: NDArray[Any] = self.pipeline.image_processor.postprocess(image, output_type="np")[0]
        pixels = (values * 255).round().astype(np.uint8)
        return with_kept_pixels(self._inpaint, request, pixels) if request.edit and request.edit.mask else pixels


def _reference_sizes(inputs: BranchInputs) -> tuple[tuple[int, int], ...]:
    return inputs.references.sizes if inputs.references else ()
