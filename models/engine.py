"""The engine: requests in, pictures and meshes out, one denoise step at a time, any mix of requests in a step."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging
from numpy.typing import NDArray

from models.budget import resolve
from models.card import EXACT, CurvePoint, ModelCard
from models.diffusion.sampling import euler_step
from models.elastic.runner import run_block
from models.errors import UnknownModel, WeightsError
from models.families import FAMILIES, FamilyEntry
from models.families.family import Family
from models.families.hunyuan3d.layout import find_config, part_of, read_config
from models.families.picture import PictureFamily
from models.mesh.cleanup import CleanMesh
from models.report import StepReport
from models.request import ComputeBudget, GenerationRequest
from models.state import DenoiseState
from models.weights import Manifest, load_router_weights, read_curve, read_json, read_manifest

logger = logging.getLogger(__name__)


class Engine:
    """Holds loaded models. Used by one thread, which owns the device.

    Modules hold weights only; all that a request has is in its `DenoiseState`.
    """

    def __init__(self, families: Mapping[str, Family], cards: Mapping[str, ModelCard]) -> None:
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
            state.complete_step(
                euler_step(state.latents, velocity, sigma, next_sigma),
                # At the end all noise is gone: the level there is 0, or 1 where levels rise, as Hunyuan3D's do.
                prediction=euler_step(state.latents, velocity, sigma, state.sigmas[-1]),
            )
        if states[0].latents.is_cuda:
            torch.cuda.synchronize()  # else the seconds, by which costs are predicted, would be those of launching
        return StepReport(time.perf_counter() - started, router_seconds, len(states), tuple(reports))

    def finish(self, state: DenoiseState) -> NDArray[np.uint8] | CleanMesh:
        """Decode a done state to pixels `(height, width, 3)` or to a mesh.

        Any thread may call this, but one at a time for a model. Raises EmptySurface where there is no mesh to make.
        """
        assert state.is_done
        return self._family(state.request.model).decode(state)

    def preview(self, state: DenoiseState) -> Callable[[], NDArray[np.uint8] | CleanMesh]:
        """A function that shows what the model, after a step or more, takes for the result; later steps do not matter.

        It gives pixels `(rows, columns, 3)`, one for each of the latents, or a coarse mesh, and raises EmptySurface
        where there is no mesh to make yet. Any thread may call it, but only one a model may be in it or in `finish`.
        """
        assert state.prediction is not None
        return partial(self._family(state.request.model).preview, state.request, state.prediction)

    def memory_bytes(self) -> dict[str, int]:
        """The GPU's memory by kind, as PyTorch counts it; nothing without a GPU in use."""
        if not torch.cuda.is_initialized():
            return {}
        free, total = torch.cuda.mem_get_info()
        return {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "peak": torch.cuda.max_memory_allocated(),
            "free": free,
            "total": total,
        }

    def sketch(self, state: DenoiseState) -> NDArray[Any]:
        """What `similarity` compares of a done state."""
        assert state.is_done
        return self._family(state.request.model).sketch(state)

    def similarity(self, model: str, a: NDArray[Any], b: NDArray[Any]) -> float:
        """How alike two sketches of `model` are, by its card's quality metric."""
        return self._family(model).similarity(a, b)

    def max_sequence_length(self, model: str) -> int:
        """Prompt tokens that an image model reads: what the stock pipeline must be given for equal results."""
        family = self._family(model)
        assert isinstance(family, PictureFamily)
        return family.max_sequence_length

    def _family(self, model: str) -> Family:
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
    families: dict[str, Family] = {}
    cards: dict[str, ModelCard] = {}
    for directory in directories:
        folder = router_weights / directory.name
        entry, index = _family_of(directory)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        manifest = read_manifest(folder)
        family: Family = entry.load_class().load(
            directory, device, dtype, load_router_weights(folder, directory), manifest.traits, offload_text_encoders
        )
        families[directory.name] = family
        cards[directory.name] = _card(family, entry.name, index, folder, manifest)
        logger.info("loaded %s on %s in %s", directory.name, device, dtype)
    return Engine(families, cards)


def _family_of(directory: Path) -> tuple[FamilyEntry, Path]:
    """The family of a model directory, and the file that names it. Raises WeightsError if there is none."""
    if (index := directory / "model_index.json").exists():
        name = str(read_json(index).get("_class_name"))
    elif config := find_config(directory):
        index, name = config, part_of(read_config(config), "model", config).class_name
    else:
        raise WeightsError(
            f"{directory} is no model directory: it has neither the model_index.json of a diffusers pipeline nor the "
            "config.yaml of Hunyuan3D"
        )
    if name not in FAMILIES:
        raise WeightsError(f"{index} names the class {name}; served are: {', '.join(FAMILIES)}")
    return FAMILIES[name], index


def _card(family: Family, family_name: str, index: Path, folder: Path, manifest: Manifest) -> ModelCard:
    """`index` is the file that names the model's class."""
    curve = read_curve(folder, family.quality_metric)
    rules = ("dense", *(["router"] if family.routers else []), "residual_cache")
    if missing := {point.rule for point in curve} - {*rules}:
        raise WeightsError(
            f"{folder}: the calibration is of rule {', '.join(missing)}; the model has {', '.join(rules)}"
        )
    basics = ModelCard(
        id=family.model_id,
        family=family_name,
        license=manifest.license,
        created=int(index.stat().st_mtime),
        default_num_inference_steps=manifest.num_inference_steps or family.default_num_inference_steps,
        default_guidance_scale=(
            family.default_guidance_scale if manifest.guidance_scale is None else manifest.guidance_scale
        ),
        max_num_inference_steps=100,
        guidance=family.guidance,
        rules=rules,
        quality_metric=family.quality_metric,
        curve=curve,
        blocks=tuple(block.name for block in family.blocks),
        dense_step_seconds=math.inf,
        call_share=0.0,
        max_batch_size=8,
    )
    card = family.card(basics, manifest)
    alone_s, pair_s = (_dense_step_seconds(family, card, batch_size) for batch_size in (1, 2))
    # A call and its rows take c + r, then c + 2 r.
    return replace(card, dense_step_seconds=alone_s, call_share=min(max(2 - pair_s / alone_s, 0.0), 1.0))


def _dense_step_seconds(family: Family, card: ModelCard, batch_size: int) -> float:
    """Time of one dense step at the card's defaults: the fastest of some four, the first of which warms up."""
    request = replace(family.example_request(card), num_inference_steps=4)
    engine = Engine({card.id: family}, {})
    states = [family.start(request, (EXACT,), EXACT) for _ in range(batch_size)]
    return min(engine.step(states).seconds for _ in range(states[0].num_steps))
