"""What all families share: elastic blocks around a loaded transformer, and requests as rows of a batch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from models.card import Guidance, ModelCard
from models.curve import CurvePoint
from models.elastic.compute import BlockCost
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


class BranchStart(NamedTuple):
    """One guidance branch at its start: its name in traces, its inputs, and the cost of each block for its row."""

    name: str
    inputs: BranchInputs
    costs: Mapping[str, BlockCost]


class Family(ABC):
    """One loaded model.

    `adapter` takes the transformer apart. `blocks` are the elastic blocks in order. `routers`, if there are any, stand
    beside the model, so its state dict is unchanged. With a `forecast_table` steps can be forecast.
    `background_remover` is the folder of the network that removes backgrounds. `room` are the bytes of the device that
    are left for requests. `quality_metric` names the metric of
    `similarity`.
    """

    adapter: Adapter
    quality_metric: ClassVar[str]

    def __init__(self, model_id: str, transformer: Any, router_weights: RouterWeights | None) -> None:
        self.model_id = model_id
        self.transformer = transformer
        self.routers = router_weights.stack if router_weights else None
        self.forecast_table: ForecastTable | None = None
        self.background_remover: Path | None = None
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
    def start(
        self,
        request: GenerationRequest,
        curve: Sequence[CurvePoint],
        point: CurvePoint,
        compute_cap: float | None = None,
    ) -> DenoiseState:
        """Encode the prompt or the image, and draw the noise. Raises InvalidRequest if the input can't be used."""

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

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        parameter: Tensor = next(self.transformer.parameters())
        return parameter.device

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

    def epilogue(self, states: Sequence[DenoiseState], streams: Streams) -> list[Velocity]:
        """Each state's velocity, with guidance applied."""
        velocities = self._velocities(states, streams).split([len(state.rows) for state in states])
        return [
            Velocity(v) if len(v) == 1 else Velocity(self.guide(state.request, v), v[:1])
            for state, v in zip(states, velocities, strict=True)
        ]

    def _velocities(self, states: Sequence[DenoiseState], streams: Streams) -> Tensor:
        """The velocities of all branches, `(rows, tokens, channels)`, for the tokens of the states' latents."""
        return self.adapter.epilogue(self.transformer, streams)

    def _new_state(
        self,
        request: GenerationRequest,
        curve: Sequence[CurvePoint],
        point: CurvePoint,
        compute_cap: float | None,
        *,
        shape: Hashable,
        latents: Tensor,
        sigmas: Tensor,
        timesteps: Tensor,
        branches: Sequence[BranchStart],
        kept: KeptRegion | None = None,
    ) -> DenoiseState:
        """A state before its first step. States of equal `shape` can share steps.

        Raises InvalidRequest if the compute that no plan can leave out exceeds the cap.
        """
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
            batch_key=(self.model_id, shape),
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
        return latents, times.to(latents.device)
