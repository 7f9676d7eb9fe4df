"""The engine: generates images and meshes, one denoise step at a time, with any mix of requests in a step."""

import gc
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.background.cut_out import NotCutOut, object_alpha
from models.card import ModelCard, shared_device
from models.curve import CurvePoint
from models.device import SideStream, hand_to_steps
from models.device_errors import DeviceErrors
from models.elastic.host import wait_for_work
from models.elastic.runner import run_block
from models.errors import InvalidRequest, UnknownModel
from models.families.family import BranchStart, Encoded, Family
from models.families.image import ImageFamily
from models.mesh.cleanup import CleanMesh
from models.mesh.surface import FieldSamples
from models.prompt_cache import PromptCache
from models.report import BlockReport, StepReport, joined
from models.request import GenerationRequest, ImageRequest
from models.state import DenoiseState, Velocity


class Engine:
    """Holds loaded models. Used by one thread, which owns the device: the one that loaded them.

    What other threads may call says so. Modules hold weights only. All state of a request is in its `DenoiseState`.
    Whatever uses the device can raise OutOfDeviceMemory, and may succeed later, and DeviceLost, after which nothing
    does in this process.
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        cards: Mapping[str, ModelCard],
        prompt_cache: PromptCache | None = None,
    ) -> None:
        self.prompt_cache = prompt_cache
        self._encoding: Mapping[str, SideStream] = {}
        self._decoding: Mapping[str, SideStream] = {}
        self._serve(families, cards)

    def add(self, family: Family, card: ModelCard) -> None:
        """Serve one more model. Raises WeightsError if the weights of all leave no room for requests."""
        self._serve({**self._families, card.id: family}, shared_device({**self.cards, card.id: card}))

    def remove(self, model: str) -> None:
        """Let go of a model, so that its memory becomes free. There must be no requests of it any more."""
        families, cards = (
            {name: value for name, value in values.items() if name != model}
            for values in (dict[str, Any](self._families), dict[str, Any](self.cards))
        )
        self._serve(families, shared_device(cards))
        if self.prompt_cache is not None:  # a model that is loaded in its place may have another text encoder
            self.prompt_cache.clear()
        gc.collect()  # modules and their hooks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _serve(self, families: Mapping[str, Family], cards: Mapping[str, ModelCard]) -> None:
        """The mappings are replaced and not changed: other threads read them."""
        for model, family in families.items():
            if model in cards:
                family.room = cards[model].memory.room
        self._encoding, self._decoding = (
            {model: streams.get(model) or SideStream(family.device) for model, family in families.items()}
            for streams in (self._encoding, self._decoding)
        )
        self._families, self.cards = families, cards

    def preparation(self, request: GenerationRequest) -> Callable[[], GenerationRequest] | None:
        """Work for `start` that another process can do: it returns the request to start, or raises
        InvalidRequest. None if there is none. `start` does what was not done before."""
        return self._family(request.model).preparation(request)

    @torch.inference_mode()
    def encode(self, request: GenerationRequest, branches: Sequence[BranchStart] | None = None) -> Encoded:
        """Encode the prompt or image and draw the noise, which is most of the work of `start`.

        `branches` are those of a request that differs in its seed alone: they are not encoded again. Any thread may
        call this, one at a time per model. Raises UnknownModel, and InvalidRequest for a prompt or image that this
        model can't serve.
        """
        family = self._family(request.model)
        with DeviceErrors("encoding", request, family.device), self._encoding[request.model].used():
            branches = branches or family.encode(request)
            encoded = Encoded(branches, family.begin(request, branches))
        hand_to_steps(encoded, family.device)
        return encoded

    def start(
        self, request: GenerationRequest, point: CurvePoint | None = None, *, encoded: Encoded | None = None
    ) -> DenoiseState:
        """The state before the first step. What was not `encoded` before is encoded here.

        Calibration and benchmarks give a `point`: it replaces the request's point and drops its cap on compute. Raises
        UnknownModel, and InvalidRequest for a prompt or a budget that this model can't serve.
        """
        family = self._family(request.model)
        curve = self.cards[request.model].curve_for(request)
        with DeviceErrors("starting", request, family.device):
            if point:
                return family.start(request, curve, point, encoded=encoded)
            return family.start(request, curve, request.point, request.compute_cap, encoded)

    def encodes_on_device(self, model: str) -> bool:
        """Whether encoding takes time of the device that steps run on."""
        return self._family(model).encodes_on_device

    def step(self, states: Sequence[DenoiseState]) -> StepReport:
        """Run the next denoise step of every state, and go on through the steps that it forecasts after that one.

        All must have one `shape`, and none may be done. Steps, prompts, guidance, budgets and rules may differ. Only
        those of one `batch_key` share calls. A step that raises has changed no state, and holds no memory any more: it
        can be repeated, in parts too.
        """
        with DeviceErrors("a denoise step of", states[0].request, states[0].latents.device, states):
            return self._step(states)

    @torch.inference_mode()
    def _step(self, states: Sequence[DenoiseState]) -> StepReport:
        started = time.perf_counter()
        velocities, router_seconds, blocks = self._compute(states)
        moves = [state.moved(velocity) for state, velocity in zip(states, velocities, strict=True)]
        forecast = [state.complete_step(move) for state, move in zip(states, moves, strict=True)]
        if states[0].latents.is_cuda:
            # Costs are predicted from these seconds, which must include the kernels' run time. Nothing else of the
            # device is waited for, and whoever decodes the latents has them.
            wait_for_work(states[0].latents.device)
        return StepReport(
            time.perf_counter() - started,
            router_seconds,
            len(states),
            blocks,
            num_forecast=sum(forecast),
            num_forecast_rows=sum(steps * len(state.rows) for steps, state in zip(forecast, states, strict=True)),
            compiled=self._family(states[0].request.model).take_compiled(),
        )

    @torch.inference_mode()
    def velocities(self, states: Sequence[DenoiseState]) -> list[Velocity]:
        """The velocities of the states' next step, for `DenoiseState.moved`. Calibration learns from them."""
        return self._compute(states)[0]

    def _compute(self, states: Sequence[DenoiseState]) -> tuple[list[Velocity], float, tuple[BlockReport, ...]]:
        """The velocities of the states' next step, the seconds that routers took, and what blocks did.

        Exact states run in calls of their own, as in the publisher's pipeline: among other rows, sums round otherwise.
        """
        assert len({state.shape for state in states}) == 1
        family = self._family(states[0].request.model)
        for state in states:
            state.prepare_step()
        together = [state for state in states if not state.is_exact]
        calls = [together] if together else []
        calls += [[part] for state in states if state.is_exact for part in family.exact_calls(state)]
        done = [self._call(family, call) for call in calls]
        of_row = {row: velocity for call in done for row, velocity in call.velocities.items()}
        return (
            [family.velocity(state, torch.cat([of_row[id(row)] for row in state.rows])) for state in states],
            sum(call.router_seconds for call in done),
            tuple(joined(reports) for reports in zip(*(call.reports for call in done), strict=True)),
        )

    def _call(self, family: Family, states: Sequence[DenoiseState]) -> "_Call":
        """Run the transformer once, for all rows of `states`."""
        rows = [row for state in states for row in state.rows]
        streams = family.prologue(states)
        needs_scores = any(row.rule.needs_scores for row in rows)
        modulations = family.router_modulations(streams) if needs_scores else None
        reports, router_seconds = [], 0.0
        for index, block in enumerate(family.blocks):
            result = run_block(block, index, streams, modulations[index] if modulations else None, rows)
            streams = result.streams
            reports.append(result.report)
            router_seconds += result.router_seconds
        velocities = family.epilogue(states, streams).split(1)
        return _Call(dict(zip(map(id, rows), velocities, strict=True)), router_seconds, reports)

    def finish(self, state: DenoiseState) -> NDArray[np.uint8] | CleanMesh:
        """Decode a done state to a mesh or to pixels, `(height, width, 3)`, or 4 channels if they are transparent.

        Any thread may call this, one at a time per model. Raises EmptySurface if the field has no surface, and
        InvalidRequest if an image shows no object to cut out.
        """
        assert state.is_done
        family, request = self._family(state.request.model), state.request
        with DeviceErrors("decoding", request, family.device), self._decoding[request.model].used():
            result = family.decode(state)
        if isinstance(request, ImageRequest) and request.is_transparent:
            assert not isinstance(result, CleanMesh)
            return _cut_out(result, family.background_remover)
        return result

    def decode_in_turns(self, state: DenoiseState) -> Generator[None, None, FieldSamples] | None:
        """Decode a done state to a field, which `models.mesh.file` makes a file: the long way to what `finish` returns.

        Each `next` takes a small part of the time, so that denoise steps can go between. It raises EmptySurface if the
        field is not finite. None for models without a field, which only `finish` decodes. Used by the device's thread.
        """
        assert state.is_done
        decoding = self._family(state.request.model).decode_in_turns(state)
        return None if decoding is None else _in_turns(decoding, state.request, state.latents.device)

    def preview(self, state: DenoiseState) -> Callable[[], NDArray[np.uint8] | CleanMesh]:
        """A function that decodes the current estimate of the result cheaply. The state needs at least one step.

        It returns pixels `(rows, columns, 3)`, one per latent pixel, or a coarse mesh. It raises EmptySurface if the
        field has no surface yet. Later steps do not change what it returns. Any thread may call it, but per model only
        one thread at a time may be in it or in `finish`; another may be in `decode_in_turns`.
        """
        assert state.prediction is not None
        return partial(self._preview, state.request, state.prediction)

    def _preview(self, request: GenerationRequest, prediction: Tensor) -> NDArray[np.uint8] | CleanMesh:
        with DeviceErrors("a preview of", request, prediction.device), self._decoding[request.model].used():
            return self._family(request.model).preview(request, prediction)

    def memory_bytes(self) -> dict[str, int]:
        """The GPU's memory in bytes by kind, as PyTorch counts it; empty if no GPU is in use."""
        device = next((family.device for family in self._families.values()), None)
        if device is None or device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(device)
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": torch.cuda.max_memory_allocated(device),
            "free": free,
            "total": total,
        }

    def quality_sample(self, state: DenoiseState) -> NDArray[Any]:
        """The form of a done state's result that `similarity` compares."""
        assert state.is_done
        return self._family(state.request.model).quality_sample(state)

    def similarity(self, model: str, a: NDArray[Any], b: NDArray[Any]) -> float:
        """The similarity of two quality samples of `model`, by its card's quality metric; 1 for equal ones."""
        return self._family(model).similarity(a, b)

    def max_sequence_length(self, model: str) -> int:
        """How many prompt tokens an image model reads. The stock pipeline needs this value for equal results."""
        family = self._family(model)
        assert isinstance(family, ImageFamily)
        return family.max_sequence_length

    def _family(self, model: str) -> Family:
        if model not in self._families:
            raise UnknownModel(f"model '{model}' is not loaded; loaded: {', '.join(self._families)}")
        return self._families[model]


class _Call(NamedTuple):
    """One call of the transformer. `velocities` has one `(1, tokens, channels)` by the id of each row."""

    velocities: Mapping[int, Tensor]
    router_seconds: float
    reports: Sequence[BlockReport]


def _in_turns(
    decoding: Generator[None, None, FieldSamples], request: GenerationRequest, device: torch.device
) -> Generator[None, None, FieldSamples]:
    with DeviceErrors("decoding", request, device):
        return (yield from decoding)


def _cut_out(pixels: NDArray[np.uint8], remover: Path | None) -> NDArray[np.uint8]:
    """The pixels with the object's alpha as a fourth channel."""
    try:
        return np.dstack((pixels, object_alpha(pixels, remover, is_whole=False)))
    except NotCutOut as error:
        raise InvalidRequest(
            f"background 'transparent' is not possible: the generated image {error}; try another seed, a prompt that "
            "names one object, or background: opaque",
            "background",
        ) from error
