"""What the text-to-image families share: wrapping the transformer's blocks, starting requests, batches of rows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from models.card import CurvePoint, Guidance
from models.diffusion.sampling import flow_schedule
from models.elastic.compute import BlockCost
from models.elastic.runner import Row, Streams
from models.families.wrapping import Anatomy, elastic_blocks
from models.request import GenerationRequest
from models.rules import RULES
from models.state import BranchInputs, DenoiseState
from models.weights import CheckpointTraits, RouterWeights


class Branch(NamedTuple):
    """One guidance branch: its name in traces, its prompt, and the request's field that this came from."""

    name: str
    prompt: str
    param: str


class PictureFamily(ABC):
    """One loaded text-to-image model.

    `blocks` are the elastic blocks in order; `routers`, if there are any, stand beside the model, whose state dict is
    untouched. What a subclass adds is its diffusers pipeline's own code, called piece by piece.
    """

    anatomy: Anatomy

    def __init__(self, model_id: str, pipeline: DiffusionPipeline, router_weights: RouterWeights | None) -> None:
        self.model_id = model_id
        self.pipeline: Any = pipeline
        self.transformer: Any = self.pipeline.transformer
        self.routers = router_weights.stack if router_weights else None
        self.blocks = elastic_blocks(self.transformer, self.anatomy, router_weights)
        self._router_modulation: nn.Linear | None = router_weights.stack.fused_modulation() if router_weights else None
        self._rotary: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    @abstractmethod
    def load(
        cls,
        directory: Path,
        device: str,
        dtype: torch.dtype,
        router_weights: RouterWeights | None,
        traits: CheckpointTraits,
        offload_text_encoders: bool,
    ) -> Self:
        """Load an ordinary diffusers directory. Raises WeightsError if parts are missing or do not fit."""

    @property
    @abstractmethod
    def guidance(self) -> Guidance: ...

    @property
    @abstractmethod
    def default_side(self) -> int:
        """Sides in pixels of a picture whose size nobody says, as in the stock pipeline."""

    @property
    @abstractmethod
    def default_num_inference_steps(self) -> int: ...

    @property
    @abstractmethod
    def default_guidance_scale(self) -> float: ...

    @property
    @abstractmethod
    def max_sequence_length(self) -> int:
        """Tokens of a prompt that the transformer reads."""

    @abstractmethod
    def block_costs(self, height: int, width: int, num_text_tokens: int) -> Mapping[str, BlockCost]:
        """Floating-point operations of one row in every block, for a picture of `height` x `width` pixels."""

    @abstractmethod
    def prologue(self, states: Sequence[DenoiseState]) -> Streams:
        """The streams that enter the first block, one row a guidance branch of each state."""

    @abstractmethod
    def guide(self, request: GenerationRequest, velocities: Tensor) -> Tensor:
        """One velocity `(1, tokens, channels)` from those of the branches `(branches, tokens, channels)`."""

    @abstractmethod
    def decode(self, state: DenoiseState) -> np.ndarray:
        """Latents to pixels `(height, width, 3)` uint8."""

    @abstractmethod
    def _branches(self, request: GenerationRequest) -> Sequence[Branch]:
        """The guidance branches, the conditional one first."""

    @abstractmethod
    def _encode(self, branch: Branch, request: GenerationRequest) -> BranchInputs:
        """Raises InvalidRequest if the prompt has too many tokens."""

    @property
    def pixels_per_token(self) -> int:
        """Sides of a picture are multiples of this."""
        return int(self.pipeline.vae_scale_factor) * 2

    @torch.inference_mode()
    def start(
        self,
        request: GenerationRequest,
        curve: Sequence[CurvePoint],
        point: CurvePoint,
        compute_cap: float | None = None,
    ) -> DenoiseState:
        """Encode the prompts and draw the noise. Raises InvalidRequest if a prompt has too many tokens."""
        branches = self._branches(request)
        inputs = [self._encode(branch, request) for branch in branches]
        latents = self._draw_latents(request)
        sigmas, timesteps = flow_schedule(self.pipeline.scheduler, request.num_inference_steps, latents.shape[1])
        rows = [
            Row(
                RULES[point.rule],
                point.policy,
                branch.name,
                request.num_inference_steps,
                self.block_costs(request.height, request.width, part.num_text_tokens),
                part.num_text_tokens,
            )
            for branch, part in zip(branches, inputs, strict=True)
        ]
        return DenoiseState(
            request=request,
            batch_key=(self.model_id, request.height, request.width),
            latents=latents,
            sigmas=sigmas,
            timesteps=timesteps,
            rows=rows,
            inputs=inputs,
            curve=curve,
            point=point,
            dense_flops=sum(cost.dense for row in rows for cost in row.costs.values()),
            compute_cap=compute_cap,
        )

    def _draw_latents(self, request: GenerationRequest) -> Tensor:
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
        # FLUX's pipeline gives the positions of its tokens too.
        latents: Tensor = drawn[0] if isinstance(drawn, tuple) else drawn
        return latents

    def router_modulations(self, streams: Streams) -> tuple[Tensor, ...] | None:
        """What each block's router takes from the time embedding of this step; None without routers."""
        if self._router_modulation is None:
            return None
        return self._router_modulation(F.silu(streams.temb)).chunk(len(self.blocks), dim=1)

    def epilogue(self, states: Sequence[DenoiseState], streams: Streams) -> list[Tensor]:
        """Each state's velocity `(1, tokens, channels)`, guidance applied."""
        velocities = self.anatomy.epilogue(self.transformer, streams).split([len(state.rows) for state in states])
        return [v if len(v) == 1 else self.guide(state.request, v) for state, v in zip(states, velocities, strict=True)]

    def _latents_and_times(self, states: Sequence[DenoiseState]) -> tuple[Tensor, Tensor]:
        """Latents `(rows, tokens, channels)` and times `(rows,)` in [0, 1] of all branches."""
        latents = torch.cat([state.latents for state in states for _ in state.rows])
        times = torch.cat([state.timesteps[state.step_index].expand(len(state.rows)) for state in states])
        return latents, times.to(latents.device, latents.dtype) / 1000

    def _rotary_embedding(self, request: GenerationRequest, num_text_tokens: int) -> tuple[Tensor, Tensor]:
        key = (num_text_tokens, request.height // self.pixels_per_token, request.width // self.pixels_per_token)
        if key not in self._rotary:
            if len(self._rotary) == 64:  # picture sizes and prompt lengths in use at the same time are few
                self._rotary.clear()
            self._rotary[key] = self.anatomy.rotary_embedding(self.transformer, *key)
        return self._rotary[key]

    def _pixels(self, picture: Tensor) -> np.ndarray:
        """Decoded `(1, 3, height, width)` in [-1, 1] as the stock pipeline rounds it."""
        pixels: np.ndarray = self.pipeline.image_processor.postprocess(picture, output_type="np")[0]
        return (pixels * 255).round().astype("uint8")
