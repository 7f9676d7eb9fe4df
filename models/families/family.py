"""What all families share: elastic blocks around a loaded transformer, and requests as rows of a batch."""

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from models.card import Guidance, ModelCard
from models.curve import EXACT, CurvePoint
from models.elastic.compiled import BlockCompiler
from models.elastic.compute import BlockCost
from models.elastic.host import to_device
from models.elastic.offloading import offloaded
from models.elastic.plan import MLP_WIDTHS
from models.elastic.row import Row
from models.elastic.streams import Streams
from models.errors import InvalidRequest
from models.families.wrapping import Adapter, elastic_blocks
from models.load_options import LoadOptions
from models.memory import ModelMemory
from models.mesh.cleanup import CleanMesh
from models.mesh.surface import FieldSamples
from models.request import GenerationRequest, LatencyBudget
from models.rules import RULES
from models.rules.forecast import Forecaster, ForecastTable
from models.state import BranchInputs, DenoiseState, KeptRegion, Velocity
from models.weights import CheckpointTraits, Manifest, RouterWeights

logger = logging.getLogger(__name__)

_COMPILED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far latents of compiled blocks may be from those of uncompiled ones, by the type of the computation.

Measured were 1e-5 and 0.08, on small models (docs/experiments.md).
"""


class BranchStart(NamedTuple):
    """One guidance branch at its start: its name in traces, its inputs, and the cost of each block for its row.

    `was_cached` says whether its prompt was in the cache, None if it was not looked up there.
    """

    name: str
    inputs: BranchInputs
    costs: Mapping[str, BlockCost]
    was_cached: bool | None = None


class Beginning(NamedTuple):
    """Where a request begins. Requests of equal `shape` can share steps. The rest is as in `DenoiseState`."""

    shape: Hashable
    latents: Tensor
    sigmas: Tensor
    timesteps: Tensor
    kept: KeptRegion | None = None
    num_picture_tokens: int = 0


class Encoded(NamedTuple):
    """All that needs the device before a request starts. Nothing changes its tensors."""

    branches: Sequence[BranchStart]
    beginning: Beginning


class Family(ABC):
    """One loaded model.

    `adapter` takes the transformer apart. `blocks` are the elastic blocks in order. `routers`, if there are any, stand
    beside the model, so its state dict is unchanged. With a `forecast_table` steps can be forecast.
    `background_remover` is the folder of the network that removes backgrounds. `room` are the bytes of the device that
    are left for requests. `quality_metric` names the metric of `similarity`. `joins_branches` says whether the
    publisher's pipeline runs all guidance branches in one call, else in a call for each. `exact_tolerance` is how far
    the latents of exact results may be from that pipeline's: 0 means bit for bit. What computes otherwise, such as
    compiled blocks, raises it.
    """

    adapter: Adapter
    quality_metric: ClassVar[str]
    joins_branches: ClassVar[bool] = True
    exact_tolerance: float = 0.0

    def __init__(self, model_id: str, transformer: Any, router_weights: RouterWeights | None) -> None:
        self.model_id = model_id
        self.transformer = transformer
        self.routers = router_weights.stack if router_weights else None
        self.forecast_table: ForecastTable | None = None
        self.background_remover: Path | None = None
        self._compiler: BlockCompiler | None = None
        self.room = math.inf
        self._forecasters: dict[tuple[bytes, bool], Forecaster] = {}
        self.blocks = elastic_blocks(transformer, self.adapter, router_weights)
        self._router_modulation: nn.Linear | None = router_weights.stack.fused_modulation() if router_weights else None

    @classmethod
    @abstractmethod
    def load(
        cls,
        directory: Path,
        device: str,
        dtype: torch.dtype,
        router_weights: RouterWeights | None,
        traits: CheckpointTraits,
        options: LoadOptions,
    ) -> Self:
        """Load a model directory. Raises WeightsError if parts are missing or do not fit together."""

    def keep_blocks_on_host(self, device: torch.device) -> None:
        """Leave the weights of blocks where they are, on the host, and move the rest of the transformer to `device`."""
        self.blocks = offloaded(self.blocks, device)
        self.transformer.to(device)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        parameter: Tensor = next(self.transformer.parameters())
        return parameter.device

    @property
    def encodes_on_device(self) -> bool:
        """Whether prompts or images are encoded on the transformer's device."""
        return True

    @property
    @abstractmethod
    def guidance(self) -> Guidance: ...

    @property
    @abstractmethod
    def default_num_inference_steps(self) -> int: ...

    @property
    @abstractmethod
    def default_guidance_scale(self) -> float: ...

    @abstractmethod
    def card(self, basics: ModelCard, manifest: Manifest) -> ModelCard:
        """The model's card, from the fields that all cards have and the manifest's defaults."""

    @property
    @abstractmethod
    def modules(self) -> Sequence[nn.Module]:
        """All parts that have weights, but for the routers."""

    @abstractmethod
    def memory(self) -> ModelMemory:
        """What the model and its requests take of the device, by formula."""

    @abstractmethod
    def example_request(self, card: ModelCard) -> GenerationRequest:
        """A request with the card's defaults at the exact budget. It costs as much as a client's."""

    def preparation(self, request: GenerationRequest) -> Callable[[], GenerationRequest] | None:
        """Work for `start` that another process can do: it returns the request to start. None if there is none.

        It can be pickled, and raises InvalidRequest if the input can't be used. It imports torch only if it needs a
        network. `start` does what was not done before.
        """
        return None

    @abstractmethod
    def encode(self, request: GenerationRequest) -> Sequence[BranchStart]:
        """Encode the prompt or the image. The result fits all requests that differ in their seed alone.

        Any thread may call this and `begin`, one at a time. Raises InvalidRequest if the input can't be used.
        """

    @abstractmethod
    def begin(self, request: GenerationRequest, branches: Sequence[BranchStart]) -> Beginning:
        """Draw the noise, and put it on the picture that is edited. Raises InvalidRequest if that can't be used."""

    @torch.inference_mode()
    def start(
        self,
        request: GenerationRequest,
        curve: Sequence[CurvePoint],
        point: CurvePoint,
        compute_cap: float | None = None,
        encoded: Encoded | None = None,
    ) -> DenoiseState:
        """The state before the first step. `encoded` is of this request; if it is None, it is made here.

        Raises InvalidRequest if the input can't be used, or if the compute that no plan can leave out exceeds the cap.
        """
        if encoded is None:
            branches = self.encode(replace(request, point=point))
            encoded = Encoded(branches, self.begin(request, branches))
        state = self._new_state(request, curve, point, compute_cap, encoded.beginning, encoded.branches)
        state.num_picture_tokens = encoded.beginning.num_picture_tokens
        return state

    @abstractmethod
    def prologue(self, states: Sequence[DenoiseState]) -> Streams:
        """The streams that enter the first block, one row for each guidance branch of each state."""

    @abstractmethod
    def guide(self, request: GenerationRequest, velocities: Tensor) -> Tensor:
        """Guidance: one velocity `(1, tokens, channels)` from the branches' `(branches, tokens, channels)`."""

    @abstractmethod
    def decode(self, state: DenoiseState) -> NDArray[np.uint8] | CleanMesh:
        """Decode a done state to pixels `(height, width, 3)` or a mesh."""

    def decode_in_turns(self, state: DenoiseState) -> Generator[None, None, FieldSamples] | None:
        """The decoding of a done state to a field, a small part of it at each `next`. None if `decode` is short."""
        return None

    @abstractmethod
    def preview(self, request: GenerationRequest, prediction: Tensor) -> NDArray[np.uint8] | CleanMesh:
        """A cheap preview of a predicted clean sample `(1, tokens, channels)`: few pixels or a coarse mesh."""

    @abstractmethod
    def quality_sample(self, state: DenoiseState) -> NDArray[Any]:
        """The part of a done state's result that `similarity` compares."""

    @abstractmethod
    def similarity(self, a: NDArray[Any], b: NDArray[Any]) -> float:
        """The similarity of two quality samples by `quality_metric`; 1 means equal."""

    @torch.inference_mode()
    def compile_blocks(self, requests: Sequence[GenerationRequest]) -> None:
        """Compile the blocks, for all sizes and numbers of rows, which takes minutes.

        `requests` must be able to share a step. Their prompts should differ in length, so that some are padded. Narrow
        MLPs are compiled now if there are routers, which alone ask for them.
        """
        states = [self.start(request, (EXACT,), EXACT) for request in requests]
        for state in states:
            state.prepare_step()
        began = time.perf_counter()
        self._compiler = BlockCompiler(self.blocks, self.adapter.call_block)
        self.blocks = self._compiler.blocks
        computes_in = next(self.transformer.parameters()).dtype
        self.exact_tolerance = max(self.exact_tolerance, _COMPILED_TOLERANCE[computes_in])
        self._compiler.warm_up(self.prologue(states), MLP_WIDTHS if self.routers else MLP_WIDTHS[-1:])
        num_graphs, seconds = len(self._compiler.take_new()), time.perf_counter() - began
        logger.info("compiled %d graphs for the blocks of %s in %.0f s", num_graphs, self.model_id, seconds)

    def take_compiled(self) -> tuple[str, ...]:
        """The kind of block of every graph that a step has compiled since the last call; a warning if there are any."""
        new = self._compiler.take_new() if self._compiler else ()
        if new:
            logger.warning("a step of %s has compiled blocks of kind %s", self.model_id, ", ".join(new))
        return new

    def weight_bytes(self) -> int:
        """Bytes of all weights on the transformer's device. Parts that are elsewhere do not count."""
        modules = [*self.modules, *([self.routers] if self.routers is not None else [])]
        storages = {
            StorageWeakRef(storage): storage.nbytes()
            for module in modules
            for tensor in (*module.parameters(), *module.buffers())
            if tensor.device == self.device
            for storage in [tensor.untyped_storage()]
        }
        return sum(storages.values())

    def router_modulations(self, streams: Streams) -> tuple[Tensor, ...] | None:
        """Each block's router modulation, from the time embedding of this step. None without routers."""
        if self._router_modulation is None:
            return None
        return self._router_modulation(F.silu(streams.temb)).chunk(len(self.blocks), dim=1)

    def epilogue(self, states: Sequence[DenoiseState], streams: Streams) -> Tensor:
        """The velocities of all branches, `(rows, tokens, channels)`, for the tokens of the states' latents."""
        return self.adapter.epilogue(self.transformer, streams)

    def velocity(self, state: DenoiseState, branches: Tensor) -> Velocity:
        """The state's velocity with guidance applied, from those of its branches, `(branches, tokens, channels)`."""
        if len(branches) == 1:
            return Velocity(branches)
        return Velocity(self.guide(state.request, branches), branches[:1])

    def exact_calls(self, state: DenoiseState) -> list[DenoiseState]:
        """The parts of an exact state that the publisher's pipeline gives to the transformer one after the other."""
        return [state] if self.joins_branches else state.branches()

    def _new_state(
        self,
        request: GenerationRequest,
        curve: Sequence[CurvePoint],
        point: CurvePoint,
        compute_cap: float | None,
        beginning: Beginning,
        branches: Sequence[BranchStart],
    ) -> DenoiseState:
        """A state before its first step. States of equal `shape` can share steps, unless they are exact.

        Raises InvalidRequest if the compute that no plan can leave out exceeds the cap.
        """
        shape, latents, sigmas, timesteps, kept, _ = beginning
        forecaster = None
        may_move = isinstance(request.budget, LatencyBudget) and any(other.steps for other in curve)
        if self.forecast_table and (point.steps or may_move):
            forecaster = self._forecaster(sigmas, len(branches) > 1)
        rows = [
            Row(RULES[point.policy.rule], point.policy, branch.name, len(timesteps), branch.costs)
            for branch in branches
        ]
        dense_flops = sum(cost.dense for row in rows for cost in row.costs.values())
        if compute_cap is not None:
            unavoidable, reason = 1 / len(timesteps), "one of its steps at least is computed, which"
            if not point.steps:
                unavoidable = sum(cost.always for row in rows for cost in row.costs.values()) / dense_flops
                reason = "a step of this model that skips every block"
            if compute_cap < unavoidable:
                raise InvalidRequest(
                    f"compute_ratio {compute_cap} is not possible: {reason} costs {unavoidable:.4f}; try "
                    f"{math.ceil(100 * unavoidable) / 100}",
                    "budget.compute_ratio",
                )
        return DenoiseState(
            request=request,
            shape=(self.model_id, shape),
            latents=latents,
            sigmas=sigmas,
            timesteps=timesteps,
            rows=rows,
            inputs=[branch.inputs for branch in branches],
            curve=curve,
            point=point,
            dense_flops=dense_flops,
            compute_cap=compute_cap,
            forecaster=forecaster,
            kept=kept,
            exact_tolerance=self.exact_tolerance if request.wants_exact else None,
            num_prompt_tokens=sum(branch.inputs.num_prompt_tokens for branch in branches),
        )

    def _forecaster(self, sigmas: Tensor, is_guided: bool) -> Forecaster:
        """The forecaster of a schedule. It is kept, since its plans take up to a second for a hundred steps."""
        assert self.forecast_table is not None
        key = (sigmas.numpy().tobytes(), is_guided)
        if key not in self._forecasters:
            if len(self._forecasters) == 64:
                self._forecasters.clear()
            levels = sigmas.double().numpy()
            self._forecasters[key] = self.forecast_table.forecaster(levels, has_conditionals=is_guided)
        return self._forecasters[key]

    def _latents_and_times(self, states: Sequence[DenoiseState]) -> tuple[Tensor, Tensor]:
        """Latents `(rows, tokens, channels)` and float32 `timesteps` `(rows,)` of all branches."""
        latents = torch.cat([state.latents for state in states for _ in state.rows])
        times = torch.cat([state.timesteps[state.step_index].expand(len(state.rows)) for state in states])
        return latents, to_device(times, latents.device)
