"""FLUX.1: loading, prompts, batches of rows, decoding. Everything here is diffusers' own, called piece by piece."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
from diffusers.pipelines.flux import pipeline_flux
from torch import Tensor, nn
from torch.nn import functional as F

from models.card import CurvePoint
from models.diffusion.sampling import classifier_free_guidance, flow_schedule
from models.elastic.compute import BlockCost, attention_flops
from models.elastic.router import MLP_WIDTHS, RouterStack
from models.elastic.runner import ElasticBlock, Row, Streams
from models.elastic.width import narrowed, permute_hidden_neurons
from models.errors import InvalidRequest, WeightsError
from models.families.flux import adapter
from models.families.flux.adapter import FluxBlock
from models.request import GenerationRequest
from models.rules import RULES
from models.state import BranchInputs, DenoiseState
from models.weights import RouterWeights


class FluxFamily:
    """One loaded FLUX model.

    `blocks` are the elastic blocks in order; `routers`, if there are any, stand beside the model, whose state dict is
    untouched.
    """

    def __init__(self, model_id: str, pipeline: FluxPipeline, router_weights: RouterWeights | None) -> None:
        self.model_id = model_id
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        self.routers = router_weights.stack if router_weights else None
        self._router_modulation = router_weights.stack.fused_modulation() if router_weights else None
        if router_weights:
            _check_fit(router_weights.stack, self.transformer)
            permute_neurons(adapter.blocks(self.transformer), router_weights.neuron_orders)
        self.blocks = tuple(
            ElasticBlock(
                name,
                {width: block if width == 1 else _narrow(block, width) for width in MLP_WIDTHS},
                adapter.call_block,
                self.routers.routers[i] if self.routers else None,
            )
            for i, (name, block) in enumerate(adapter.blocks(self.transformer).items())
        )
        self._rotary: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    def load(
        cls, directory: Path, device: str, dtype: torch.dtype, router_weights: RouterWeights | None
    ) -> "FluxFamily":
        """Load an ordinary diffusers FLUX directory. Raises WeightsError if parts are missing or do not fit."""
        # It warns of prompts that CLIP cuts by quoting them, and prompts are not for logs.
        logging.getLogger(pipeline_flux.__name__).setLevel(logging.ERROR)
        try:
            pipeline = FluxPipeline.from_pretrained(directory, dtype=dtype, local_files_only=True).to(device)
        except (OSError, ValueError) as error:
            raise WeightsError(f"{directory} can't be loaded: {error}") from error
        if router_weights:
            router_weights.stack.to(device, dtype)
        return cls(directory.name, pipeline, router_weights)

    @property
    def pixels_per_token(self) -> int:
        """Sides of a picture are multiples of this."""
        return int(self.pipeline.vae_scale_factor) * 2

    @property
    def max_sequence_length(self) -> int:
        """T5 tokens of a prompt: what the tokenizer says, at most FLUX.1-dev's 512 and FLUX.1-schnell's 256."""
        limit = 512 if self.transformer.config.guidance_embeds else 256
        return min(limit, int(self.pipeline.tokenizer_2.model_max_length))

    def block_costs(self, height: int, width: int) -> Mapping[str, BlockCost]:
        """Floating-point operations of one row in every block, for a picture of `height` x `width` pixels."""
        image = (height // self.pixels_per_token) * (width // self.pixels_per_token)
        text, channels = self.max_sequence_length, self.transformer.inner_dim
        square, tokens = 2.0 * channels * channels, text + image
        attention = attention_flops(tokens, channels)
        # Modulation, then attention's four projections, the text stream's MLP; double blocks have each twice.
        double = BlockCost(fixed=square * (12 + 4 * tokens + 8 * text) + attention, mlp=square * 8 * image)
        single = BlockCost(fixed=square * (3 + 4 * tokens) + attention, mlp=square * 8 * tokens)
        return {block.name: double if block.name.startswith("double") else single for block in self.blocks}

    @torch.inference_mode()
    def start(
        self,
        request: GenerationRequest,
        curve: Sequence[CurvePoint],
        point: CurvePoint,
        compute_cap: float | None = None,
    ) -> DenoiseState:
        """Encode the prompts and draw the noise. Raises InvalidRequest if a prompt has too many tokens."""
        self._check_length(request.prompt, "prompt")
        prompts = [("cond", request.prompt)]
        if request.true_cfg_scale > 1 and request.negative_prompt is not None:
            self._check_length(request.negative_prompt, "negative_prompt")
            prompts.append(("uncond", request.negative_prompt))
        pipeline = self.pipeline
        generator = torch.Generator().manual_seed(request.seed)
        latents, _ = pipeline.prepare_latents(
            1,
            self.transformer.config.in_channels // 4,
            request.height,
            request.width,
            self.transformer.dtype,
            self.transformer.device,
            generator,
        )
        sigmas, timesteps = flow_schedule(pipeline.scheduler, request.num_inference_steps, latents.shape[1])
        costs = self.block_costs(request.height, request.width)
        rows = [
            Row(RULES[point.rule], point.policy, branch, request.num_inference_steps, costs) for branch, _ in prompts
        ]
        return DenoiseState(
            request=request,
            batch_key=(self.model_id, request.height, request.width),
            latents=latents,
            sigmas=sigmas,
            timesteps=timesteps,
            rows=rows,
            inputs=[self._branch_inputs(prompt, request.guidance_scale) for _, prompt in prompts],
            curve=curve,
            point=point,
            dense_flops=len(rows) * sum(cost.dense for cost in costs.values()),
            compute_cap=compute_cap,
        )

    def _check_length(self, prompt: str, param: str) -> None:
        count = len(self.pipeline.tokenizer_2(prompt).input_ids)
        if count > self.max_sequence_length:
            raise InvalidRequest(
                f"{param} has {count} tokens; {self.model_id} reads at most {self.max_sequence_length}, end included",
                param,
            )

    def _branch_inputs(self, prompt: str, guidance_scale: float) -> BranchInputs:
        prompt_embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt, None, device=self.transformer.device, max_sequence_length=self.max_sequence_length
        )
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full([1], guidance_scale, device=self.transformer.device, dtype=torch.float32)
        # The embedded prompt is the same at every step, so it is computed once.
        return BranchInputs(self.transformer.context_embedder(prompt_embeds), pooled, guidance)

    def prologue(self, states: Sequence[DenoiseState]) -> Streams:
        """The streams that enter the first block, one row a guidance branch of each state."""
        latents = torch.cat([state.latents for state in states for _ in state.rows])
        timestep = torch.cat([state.timesteps[state.step_index].expand(len(state.rows)) for state in states])
        inputs = [branch for state in states for branch in state.inputs]
        guidance = [branch.guidance for branch in inputs if branch.guidance is not None]
        return adapter.prologue(
            self.transformer,
            latents,
            timestep.to(latents.device, latents.dtype) / 1000,
            torch.cat(guidance) if guidance else None,
            torch.cat([branch.context for branch in inputs]),
            torch.cat([branch.pooled for branch in inputs]),
            self._rotary_embedding(states[0].request, inputs[0].context.shape[1]),
        )

    def router_modulations(self, streams: Streams) -> tuple[Tensor, ...] | None:
        """What each block's router takes from the time embedding of this step; None without routers."""
        if self._router_modulation is None:
            return None
        return self._router_modulation(F.silu(streams.temb)).chunk(len(self.blocks), dim=1)

    def _rotary_embedding(self, request: GenerationRequest, num_text_tokens: int) -> tuple[Tensor, Tensor]:
        key = (num_text_tokens, request.height // self.pixels_per_token, request.width // self.pixels_per_token)
        if key not in self._rotary:
            if len(self._rotary) == 64:  # picture sizes in use at the same time are few
                self._rotary.clear()
            self._rotary[key] = adapter.rotary_embedding(self.transformer, *key)
        return self._rotary[key]

    def epilogue(self, states: Sequence[DenoiseState], streams: Streams) -> list[Tensor]:
        """Each state's velocity `(1, tokens, channels)`, guidance applied."""
        velocities = adapter.epilogue(self.transformer, streams).split([len(state.rows) for state in states])
        return [
            v if len(v) == 1 else classifier_free_guidance(v[:1], v[1:], state.request.true_cfg_scale)
            for state, v in zip(states, velocities, strict=True)
        ]

    @torch.inference_mode()
    def decode(self, state: DenoiseState) -> np.ndarray:
        """Latents to pixels `(height, width, 3)` uint8."""
        pipeline, vae = self.pipeline, self.pipeline.vae
        request = state.request
        latents = pipeline._unpack_latents(state.latents, request.height, request.width, pipeline.vae_scale_factor)
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        picture = vae.decode(latents, return_dict=False)[0]
        pixels: np.ndarray = pipeline.image_processor.postprocess(picture, output_type="np")[0]
        return (pixels * 255).round().astype("uint8")


def _check_fit(stack: RouterStack, transformer: FluxTransformer2DModel) -> None:
    num_blocks, channels = len(adapter.blocks(transformer)), transformer.inner_dim
    found = len(stack.routers), stack.routers[0].trunk.in_features
    if found != (num_blocks, channels):
        raise WeightsError(
            f"the routers are for {found[0]} blocks of {found[1]} channels, the model has {num_blocks} of {channels}"
        )


def _narrow(block: FluxBlock, mlp_width: float) -> nn.Module:
    """The block with a prefix of its image MLP's hidden neurons; a single block's MLP serves both streams.

    The text MLP of a double block always runs in full (Elastic-DiT at ce39f1d, `qwen_image_dit.py`).
    """
    first, _, column = mlp_layers(block)
    hidden = int(first.out_features * mlp_width)
    names = ("ff.net.0.proj", "ff.net.2") if isinstance(block, FluxTransformerBlock) else ("proj_mlp", "proj_out")
    return narrowed(block, {names[0]: hidden}, {names[1]: column + hidden})


def mlp_layers(block: FluxBlock) -> tuple[nn.Linear, nn.Linear, int]:
    """First and last layer of the MLP that may be narrowed, and the last one's column where hidden neurons begin."""
    if isinstance(block, FluxTransformerBlock):
        first, last = block.ff.net[0].proj, block.ff.net[2]
        assert isinstance(first, nn.Linear)
        assert isinstance(last, nn.Linear)
        return first, last, 0
    return block.proj_mlp, block.proj_out, block.proj_out.in_features - block.proj_mlp.out_features


def permute_neurons(blocks: Mapping[str, FluxBlock], orders: Mapping[str, Tensor]) -> None:
    """Put the hidden neurons of the named blocks in these orders, in place. Raises WeightsError if one does not fit."""
    for name, order in orders.items():
        if name not in blocks:
            raise WeightsError(f"neuron_order.{name} is of no block; there are: {', '.join(blocks)}")
        first, last, column = mlp_layers(blocks[name])
        if sorted(order.tolist()) != list(range(first.out_features)):
            raise WeightsError(f"neuron_order.{name} is no order of the block's {first.out_features} hidden neurons")
        permute_hidden_neurons(first, last, order.to(first.weight.device), column)
