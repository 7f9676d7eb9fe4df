"""The engine: requests in, pictures out, one denoise step at a time, any mix of requests in a step."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging

from models.budget import resolve
from models.card import EXACT, CurvePoint, ModelCard, SizeLimits
from models.diffusion.sampling import euler_step
from models.elastic.runner import run_block
from models.errors import UnknownModel, WeightsError
from models.families import FAMILIES, family_class
from models.families.picture import PictureFamily
from models.report import StepReport
from models.request import ComputeBudget, GenerationRequest, Preset, PresetBudget
from models.state import DenoiseState
from models.weights import Manifest, load_router_weights, read_curve, read_json, read_manifest

logger = logging.getLogger(__name__)


class Engine:
    """Holds loaded models. Used by one thread, which owns the device.

    Modules hold weights only; all that a request has is in its `DenoiseState`.
    """

    def __init__(self, families: Mapping[str, PictureFamily], cards: Mapping[str, ModelCard]) -> None:
        self.cards = cards
        self._families = families

    def start(self, request: GenerationRequest, point: CurvePoint | None = None) -> DenoiseState:
        """Encode the prompt and draw the noise; `point` overrides the budget, for calibration and benchmarks.

        Raises UnknownModel, and InvalidRequest for a prompt or a budget that this model can't serve.
        """
        family = self._family(request.model)
        curve = self.cards[request.model].curve
        if point:
            return family.start(request, curve, point)
        cap = request.budget.compute_ratio if isinstance(request.budget, ComputeBudget) else None
        return family.start(request, curve, resolve(request.budget, curve), cap)

    @torch.inference_mode()
    def step(self, states: Sequence[DenoiseState]) -> StepReport:
        """Run the next denoise step of every state.

        All must have the same `batch_key` and none be done; steps, prompts, guidance, budgets and rules may differ.
        """
        started = time.perf_counter()
        assert len({state.batch_key for state in states}) == 1
        family = self._family(states[0].request.model)
        for state in states:
            state.prepare_step()
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
        for state, velocity in zip(states, family.epilogue(states, streams), strict=True):
            sigma, next_sigma = state.sigmas[state.step_index], state.sigmas[state.step_index + 1]
            state.complete_step(euler_step(state.latents, velocity, sigma, next_sigma))
        if states[0].latents.is_cuda:
            torch.cuda.synchronize()  # else the seconds, by which costs are predicted, would be those of launching
        return StepReport(time.perf_counter() - started, router_seconds, len(states), tuple(reports))

    def finish(self, state: DenoiseState) -> np.ndarray:
        """Decode a done state to pixels `(height, width, 3)` uint8."""
        assert state.is_done
        return self._family(state.request.model).decode(state)

    def max_sequence_length(self, model: str) -> int:
        """Prompt tokens that `model` reads: what the stock pipeline must be given for equal results."""
        return self._family(model).max_sequence_length

    def _family(self, model: str) -> PictureFamily:
        if model not in self._families:
            raise UnknownModel(f"model '{model}' is not loaded; there is: {', '.join(self._families)}")
        return self._families[model]


def load_engine(
    directories: Sequence[Path], *, device: str, router_weights: Path, offload_text_encoders: bool = False
) -> Engine:
    """Load model directories; a model's id is its directory's name.

    Routers, terms and curve are read from `router_weights/<id>`. On a CPU models run in float32, else in bfloat16.
    With `offload_text_encoders` prompts are encoded on the CPU, which leaves the device's memory to the transformer.
    Raises WeightsError if a directory or its router folder is not what it should be.
    """
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    families: dict[str, PictureFamily] = {}
    cards: dict[str, ModelCard] = {}
    for directory in directories:
        folder = router_weights / directory.name
        name, cls = _family_of(directory)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        manifest = read_manifest(folder)
        family = cls.load(
            directory, device, dtype, load_router_weights(folder, directory), manifest.traits, offload_text_encoders
        )
        families[directory.name] = family
        cards[directory.name] = _card(family, name, directory, folder, manifest)
        logger.info("loaded %s on %s in %s", directory.name, device, dtype)
    return Engine(families, cards)


def _family_of(directory: Path) -> tuple[str, type[PictureFamily]]:
    index = directory / "model_index.json"
    if not index.exists():
        raise WeightsError(f"{directory} is not a diffusers pipeline directory: it has no model_index.json")
    pipeline_class = str(read_json(index).get("_class_name"))
    if pipeline_class not in FAMILIES:
        raise WeightsError(f"{index} names the class {pipeline_class}; served are: {', '.join(FAMILIES)}")
    return FAMILIES[pipeline_class][0], family_class(pipeline_class)


def _card(family: PictureFamily, family_name: str, directory: Path, folder: Path, manifest: Manifest) -> ModelCard:
    curve, metric = read_curve(folder)
    rules = ("dense", *(["router"] if family.routers else []), "residual_cache")
    if missing := {point.rule for point in curve} - {*rules}:
        raise WeightsError(
            f"{folder}: the calibration is of rule {', '.join(missing)}; the model has {', '.join(rules)}"
        )
    height, width = manifest.height or family.default_side, manifest.width or family.default_side
    guidance = family.default_guidance_scale if manifest.guidance_scale is None else manifest.guidance_scale
    return ModelCard(
        id=directory.name,
        family=family_name,
        modality="image",
        license=manifest.license,
        created=int((directory / "model_index.json").stat().st_mtime),
        default_height=height,
        default_width=width,
        default_num_inference_steps=manifest.num_inference_steps or family.default_num_inference_steps,
        default_guidance_scale=guidance,
        sizes=SizeLimits(family.pixels_per_token, 4 * family.pixels_per_token, 2 * max(height, width)),
        max_prompt_characters=16 * family.max_sequence_length,  # ahead of counting its tokens
        max_num_inference_steps=100,
        guidance=family.guidance,
        rules=rules,
        quality_metric=metric,
        curve=curve,
        blocks=tuple(block.name for block in family.blocks),
        dense_step_seconds=_dense_step_seconds(family, directory.name, height, width, guidance),
        max_batch_size=8,
    )


def _dense_step_seconds(family: PictureFamily, model: str, height: int, width: int, guidance: float) -> float:
    """Time of one dense step at the default size and guidance: the fastest of four, the first of which warms up."""
    request = GenerationRequest(model, "", height, width, 4, guidance, 0, PresetBudget(Preset.EXACT))
    engine = Engine({model: family}, {})
    state = family.start(request, (EXACT,), EXACT)
    return min(engine.step([state]).seconds for _ in range(request.num_inference_steps))
