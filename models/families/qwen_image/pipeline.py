"""Qwen-Image: loading, prompts, batches of rows, decoding. It calls diffusers' own code, piece by piece."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, QwenImageInpaintPipeline, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.models.activations import ApproximateGELU
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.card import Guidance
from models.diffusion.sampling import classifier_free_guidance, rescale_to_norm
from models.elastic.compute import BlockCost, attention_flops
from models.elastic.host import to_device
from models.errors import InvalidRequest
from models.families.family import Beginning, BranchStart
from models.families.image import Branch, ImageFamily
from models.families.qwen_image import adapter
from models.families.qwen_image.streams import QwenImageStreams
from models.families.wrapping import Adapter
from models.load_options import LoadOptions
from models.loading import stream_pipeline
from models.memory import ImageMemory, Values
from models.request import GenerationRequest, ImageRequest
from models.state import BranchInputs, DenoiseState
from models.weights import CheckpointTraits, MlpActivation, RouterWeights

_MAX_SEQUENCE_LENGTH = 1024
"""The limit of QwenImagePipeline."""


class QwenImageFamily(ImageFamily):
    """Guidance is true: a request with `guidance_scale` above 1 has two rows, the second for its negative prompt.

    Prompts in a batch are padded to the longest, and the padding is masked.
    """

    adapter: Adapter = adapter
    pipeline_class: ClassVar[type[DiffusionPipeline]] = QwenImagePipeline
    inpaint_pipeline = QwenImageInpaintPipeline
    step_values = (Values(15.0, 5.3), Values(11.5, 11.5))  # in the image's MLP, and in attention
    loaders: ClassVar[Mapping[str, Callable[[Path], Any]]] = {}
    """What loads parts of the pipeline that are loaded in another way than by diffusers, by their names."""
    unused: ClassVar[Sequence[str]] = ("text_encoder.lm_head", "text_encoder.model.visual")
    """Parts of the text encoder that no text needs: 2.3 GiB at the published size."""

    def __init__(
        self,
        model_id: str,
        pipeline: DiffusionPipeline,
        router_weights: RouterWeights | None,
        traits: CheckpointTraits,
    ) -> None:
        transformer: Any = pipeline.components["transformer"]
        set_activation(transformer, traits.mlp_activation)
        super().__init__(model_id, pipeline, router_weights)
        self._rescales_guidance = traits.rescales_guidance

    @classmethod
    def load(
        cls,
        directory: Path,
        device: str,
        dtype: torch.dtype,
        router_weights: RouterWeights | None,
        traits: CheckpointTraits,
        options: LoadOptions,
    ) -> Self:
        pipeline = stream_pipeline(
            cls.pipeline_class,
            directory,
            device,
            dtype,
            options=options,
            loaders=cls.loaders,
            unused=cls.unused,
        )
        if router_weights:
            router_weights.stack.to(device, dtype)
        return cls(directory.name, pipeline, router_weights, traits)

    @property
    def guidance(self) -> Guidance:
        return Guidance.TRUE

    @property
    def default_side(self) -> int:
        return int(self.pipeline.default_sample_size * self.pipeline.vae_scale_factor)

    @property
    def default_num_inference_steps(self) -> int:
        """QwenImagePipeline's default, as is the default guidance scale."""
        return 50

    @property
    def default_guidance_scale(self) -> float:
        return 4.0

    def encode(self, request: GenerationRequest) -> Sequence[BranchStart]:
        with self._no_features_left():
            return super().encode(request)

    def begin(self, request: GenerationRequest, branches: Sequence[BranchStart]) -> Beginning:
        with self._no_features_left():
            return super().begin(request, branches)

    @property
    def max_sequence_length(self) -> int:
        """Tokens of a prompt and of the template's end. The transformer does not read the template's beginning."""
        return min(_MAX_SEQUENCE_LENGTH, int(self.pipeline.tokenizer.model_max_length) - self._template_start)

    @property
    def _template_start(self) -> int:
        return int(self.pipeline.prompt_template_encode_start_idx)

    def block_costs(
        self, height: int, width: int, num_text_tokens: int, num_reference_tokens: int = 0
    ) -> Mapping[str, BlockCost]:
        image = (height // self.pixels_per_token) * (width // self.pixels_per_token) + num_reference_tokens
        text, channels = num_text_tokens, adapter.channels(self.transformer)
        square, tokens = 2.0 * channels * channels, text + image
        modulations = 18 if self.transformer.zero_cond_t else 12  # that of the image stream runs twice, or once
        # Modulations, attention's four projections, the text stream's MLP.
        cost = BlockCost(
            fixed=square * (modulations + 4 * tokens + 8 * text) + attention_flops(tokens, channels),
            mlp=square * 8 * image,
        )
        return {block.name: cost for block in self.blocks}

    @property
    def _values_per_pixel(self) -> tuple[int, int]:
        """At full resolution, where convolutions over time pad one frame to three."""
        channels = int(self.pipeline.vae.config.base_dim)
        return 10 * channels, 18 * channels

    def memory(self) -> ImageMemory:
        template = self.pipeline.tokenizer(self.pipeline.prompt_template_encode.format("")).input_ids
        memory = replace(super().memory(), pads_prompts=False, template_tokens=len(template) - self._template_start)
        if not self.transformer.zero_cond_t:
            return memory
        # Each image token has its own shift and scale there.
        return replace(memory, step_values=(Values(17.1, 5.3), *self.step_values))

    def _branches(self, request: ImageRequest) -> Sequence[Branch]:
        branches = [Branch("cond", request.prompt, "prompt")]
        if request.is_guided:
            # Without a negative prompt the stock pipeline drops guidance, with a warning. Here it is empty.
            branches.append(Branch("uncond", request.negative_prompt or "", "negative_prompt"))
        return branches

    def _encode(self, branch: Branch, pictures: Sequence[Image.Image]) -> BranchInputs:
        pipeline, transformer = self.pipeline, self.transformer
        tokens = pipeline.tokenizer(pipeline.prompt_template_encode.format(branch.prompt)).input_ids
        template = pipeline.tokenizer(pipeline.prompt_template_encode.format("")).input_ids
        limit = self.max_sequence_length - (len(template) - self._template_start)
        if (count := len(tokens) - len(template)) > limit:
            raise InvalidRequest(
                f"{branch.param} has {count} tokens; {self.model_id} reads at most {limit}", branch.param
            )
        prompt_embeds, _ = pipeline.encode_prompt(
            branch.prompt,
            device=pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
            **self._seen(pictures),
        )
        # The embedded prompt does not change with the step, so it is computed once.
        context = adapter.embed_prompt(transformer, prompt_embeds.to(transformer.device, transformer.dtype))
        return BranchInputs(context, num_prompt_tokens=count)

    def _seen(self, pictures: Sequence[Image.Image]) -> Mapping[str, Any]:
        """The pipeline's argument for the pictures that its text encoder looks at."""
        return {}

    def prologue(self, states: Sequence[DenoiseState]) -> QwenImageStreams:
        latents, times = self._latents_and_times(states)
        contexts = [branch.context for state in states for branch in state.inputs]
        context, mask = pad_prompts(contexts)
        lengths = None if mask is None else [prompt.shape[1] for prompt in contexts]
        rotary = self._rotary_embedding(states, context.shape[1])
        # Rounded as in the stock pipeline.
        timestep = times.to(latents.dtype) / 1000
        num_noise_tokens = states[0].latents.shape[1]
        return adapter.prologue(self.transformer, latents, timestep, context, mask, lengths, rotary, num_noise_tokens)

    def _rotary_factors(
        self, num_text_tokens: int, height: int, width: int, references: Sequence[tuple[int, int]] = ()
    ) -> tuple[Tensor, Tensor]:
        return adapter.rotary_embedding(self.transformer, num_text_tokens, height, width, references)

    def guide(self, request: GenerationRequest, velocities: Tensor) -> Tensor:
        cond, uncond = velocities[:1], velocities[1:]
        guided = classifier_free_guidance(cond, uncond, request.guidance_scale)
        return rescale_to_norm(guided, cond) if self._rescales_guidance else guided

    def _encode_images(self, images: Tensor) -> Tensor:
        mean, inverse = self._latents_mean_and_inverse_std
        latents = self.pipeline.vae.encode(images[:, :, None]).latent_dist.mode()
        return ((latents - mean) * inverse)[:, :, 0]

    @contextmanager
    def _no_features_left(self) -> Iterator[None]:
        """The VAE keeps features for the next frame of a video. If it fails, it would keep them until its next call."""
        try:
            yield
        except BaseException:
            self.pipeline.vae.clear_cache()
            raise

    @property
    def _latents_mean_and_inverse_std(self) -> tuple[Tensor, Tensor]:
        """Mean and inverse standard deviation of the VAE's latents, by channel, `(1, channels, 1, 1, 1)` each."""
        vae = self.pipeline.vae
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(vae.device, vae.dtype)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return mean, 1.0 / std

    @torch.inference_mode()
    def decode(self, state: DenoiseState) -> NDArray[np.uint8]:
        vae = self._vae_for(state.request)
        latents = self._unpacked(state.latents, state.request).to(vae.dtype)
        mean, inverse = self._latents_mean_and_inverse_std
        # Divided by the inverse, as in the stock pipeline, so that results are bitwise equal.
        with self._no_features_left():
            image = vae.decode(latents / inverse + mean, return_dict=False)[0][:, :, 0]
        return self._pixels(image, state.request)


def pad_prompts(contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Joins prompts `(1, tokens, channels)` to one batch `(rows, tokens, channels)`, padded to the longest.

    Also returns its mask `(rows, tokens)`, true for real tokens; None where all prompts have one length.
    """
    lengths = [context.shape[1] for context in contexts]
    if min(lengths) == max(lengths):
        return torch.cat(list(contexts)), None
    padded = pad_sequence([context[0] for context in contexts], batch_first=True)
    position = torch.arange(max(lengths), device=padded.device)
    return padded, position < to_device(torch.tensor(lengths), padded.device)[:, None]


def set_activation(transformer: QwenImageTransformer2DModel, activation: MlpActivation) -> None:
    """Give both MLPs of every block the activation that the checkpoint was trained with. Weights and names stay.

    Elastic-DiT's checkpoint needs x * sigmoid(1.702 x) (`qwen_image_dit.py` at ce39f1d), the public one the tanh GELU.
    """
    if activation is MlpActivation.GELU_TANH:
        return
    for block in adapter.blocks(transformer).values():
        for mlp in (block.img_mlp, block.txt_mlp):
            with torch.device("meta"):
                sigmoid_form = ApproximateGELU(1, 1)
            sigmoid_form.add_module("proj", mlp.net[0].get_submodule("proj"))
            mlp.net[0] = sigmoid_form
