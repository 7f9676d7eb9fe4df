"""FLUX.1: loading, prompts, batches of rows, decoding. It calls diffusers' own code, piece by piece."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline, FluxInpaintPipeline, FluxPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from models.card import Guidance
from models.diffusion.sampling import classifier_free_guidance
from models.elastic.compute import BlockCost, attention_flops
from models.errors import InvalidRequest, WeightsError
from models.families.flux import adapter
from models.families.flux.streams import FluxStreams
from models.families.image import Branch, ImageFamily
from models.families.wrapping import Adapter
from models.load_options import LoadOptions
from models.loading import stream_pipeline
from models.request import GenerationRequest, ImageRequest
from models.state import BranchInputs, DenoiseState
from models.weights import CheckpointTraits, RouterWeights


class FluxFamily(ImageFamily):
    adapter: Adapter = adapter
    pipeline_class: ClassVar[type[DiffusionPipeline]] = FluxPipeline
    inpaint_pipeline = FluxInpaintPipeline

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
        if traits != CheckpointTraits():
            raise WeightsError(
                f"{directory} is a FLUX model; FLUX models have no special traits, but the manifest names {traits}"
            )
        # Its warning about prompts that CLIP cuts quotes them, and prompts must not be logged.
        logging.getLogger(cls.pipeline_class.__module__).setLevel(logging.ERROR)
        pipeline = stream_pipeline(cls.pipeline_class, directory, device, dtype, options=options)
        if router_weights:
            router_weights.stack.to(device, dtype)
        return cls(directory.name, pipeline, router_weights)

    @property
    def guidance(self) -> Guidance:
        return Guidance.DISTILLED if self.transformer.config.guidance_embeds else Guidance.NONE

    @property
    def default_side(self) -> int:
        return int(self.pipeline.vae.config.sample_size)

    @property
    def default_num_inference_steps(self) -> int:
        """As in the model cards of FLUX.1-dev and FLUX.1-schnell, from which the default guidance scale comes too."""
        return 28 if self.guidance is Guidance.DISTILLED else 4

    @property
    def default_guidance_scale(self) -> float:
        return 3.5 if self.guidance is Guidance.DISTILLED else 0.0

    @property
    def max_sequence_length(self) -> int:
        """T5 tokens of a prompt: the tokenizer's limit, at most 512 for FLUX.1-dev and 256 for FLUX.1-schnell."""
        limit = 512 if self.guidance is Guidance.DISTILLED else 256
        return min(limit, int(self.pipeline.tokenizer_2.model_max_length))

    def block_costs(
        self, height: int, width: int, num_text_tokens: int, num_reference_tokens: int = 0
    ) -> Mapping[str, BlockCost]:
        image = (height // self.pixels_per_token) * (width // self.pixels_per_token) + num_reference_tokens
        text, channels = num_text_tokens, adapter.channels(self.transformer)
        square, tokens = 2.0 * channels * channels, text + image
        attention = attention_flops(tokens, channels)
        # Modulation, attention's four projections, the text stream's MLP. Double blocks have both streams' own.
        double = BlockCost(fixed=square * (12 + 4 * tokens + 8 * text) + attention, mlp=square * 8 * image)
        single = BlockCost(fixed=square * (3 + 4 * tokens) + attention, mlp=square * 8 * tokens)
        return {block.name: double if block.name.startswith("double") else single for block in self.blocks}

    def _branches(self, request: ImageRequest) -> Sequence[Branch]:
        branches = [Branch("cond", request.prompt, "prompt")]
        if request.is_guided:
            branches.append(Branch("uncond", request.negative_prompt or "", "negative_prompt"))
        return branches

    def _encode(self, branch: Branch, pictures: Sequence[Image.Image]) -> BranchInputs:
        count = len(self.pipeline.tokenizer_2(branch.prompt).input_ids)
        if count > self.max_sequence_length:
            raise InvalidRequest(
                f"{branch.param} has {count} tokens; {self.model_id} reads at most {self.max_sequence_length}, "
                "end included",
                branch.param,
            )
        transformer = self.transformer
        prompt_embeds, pooled, _ = self.pipeline.encode_prompt(
            branch.prompt,
            None,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
        )
        # The embedded prompt does not change with the step, so it is computed once.
        context = transformer.context_embedder(prompt_embeds.to(transformer.device, transformer.dtype))
        return BranchInputs(context, pooled.to(transformer.device, transformer.dtype), num_prompt_tokens=count)

    def _guidance(self, request: ImageRequest) -> Tensor | None:
        if self.guidance is not Guidance.DISTILLED:
            return None
        return torch.full([1], request.guidance_scale, device=self.device, dtype=torch.float32)

    def prologue(self, states: Sequence[DenoiseState]) -> FluxStreams:
        latents, times = self._latents_and_times(states)
        inputs = [branch for state in states for branch in state.inputs]
        guidance = [branch.guidance for branch in inputs if branch.guidance is not None]
        return adapter.prologue(
            self.transformer,
            latents,
            times.to(latents.dtype) / 1000,  # rounded as in the stock pipeline
            torch.cat(guidance) if guidance else None,
            torch.cat([branch.context for branch in inputs]),
            torch.cat([branch.pooled for branch in inputs if branch.pooled is not None]),
            self._rotary_embedding(states, inputs[0].num_text_tokens),
        )

    def _rotary_factors(
        self, num_text_tokens: int, height: int, width: int, references: Sequence[tuple[int, int]] = ()
    ) -> tuple[Tensor, Tensor]:
        return adapter.rotary_embedding(self.transformer, num_text_tokens, height, width, references)

    def guide(self, request: GenerationRequest, velocities: Tensor) -> Tensor:
        assert isinstance(request, ImageRequest)
        return classifier_free_guidance(velocities[:1], velocities[1:], request.true_cfg_scale)

    def _encode_images(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents = vae.encode(images).latent_dist.mode()
        return (latents - vae.config.shift_factor) * vae.config.scaling_factor

    @torch.inference_mode()
    def decode(self, state: DenoiseState) -> NDArray[np.uint8]:
        vae = self.pipeline.vae
        latents = self._unpacked(state.latents, state.request)
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        image = vae.decode(latents, return_dict=False)[0]
        return self._pixels(image, state.request)
