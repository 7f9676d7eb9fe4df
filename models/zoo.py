"""Loads models: finds a directory's family, loads it, and measures it for its card."""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import diffusers.utils.logging
import torch
import transformers.utils.logging

from models.background.remover import load_remover
from models.card import Edits, ImageCard, ModelCard
from models.curve import EXACT, FORECAST
from models.device import find_device
from models.elastic.compiled import check_compiler
from models.engine import Engine
from models.errors import WeightsError
from models.families import FAMILIES
from models.families.entry import DIFFUSERS, FamilyEntry, NamedClass
from models.families.family import Family
from models.families.image import ImageFamily
from models.file_formats import OutputFormat, encode_image
from models.float8 import FLOAT8_TOLERANCE
from models.load_options import DEFAULTS, LoadOptions, Weights
from models.memory import ModelMemory
from models.mesh.cleanup import CleanMesh
from models.prompt_cache import PromptCache
from models.published_terms import published_terms
from models.request import GenerationRequest, ImageEdit, ImageRequest
from models.rules import RULES
from models.rules.forecast import ForecastTable, read_forecast_table
from models.state import DenoiseState
from models.weights import Manifest, load_router_weights, read_curve, read_manifest

logger = logging.getLogger(__name__)


def load_engine(
    directories: Sequence[Path],
    *,
    device: str,
    router_weights: Path,
    background_remover: Path | None = None,
    options: LoadOptions = DEFAULTS,
) -> Engine:
    """Load model directories. A model's id is its directory's name, with those of its adapters (`LoadOptions.source`).

    Routers, terms of use and the curve are read from `router_weights/<id>`. `background_remover` is the folder of the
    network that removes backgrounds; without it, only plain ones can be removed from input images. Raises DeviceError
    if there is no such device, CompilerError if blocks are to be compiled and can't be, and WeightsError if a
    directory, its router folder or the remover is missing parts or malformed, and if the weights take more memory than
    there is. A GPU becomes the current device of the calling thread, which is to use the engine.
    """
    _use(device)
    if options.compiles:
        check_compiler(device)
    if background_remover is not None:
        load_remover(background_remover)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    engine = Engine({}, {}, PromptCache(options.prompt_cache_bytes))
    for directory in directories:
        add_to = load_model(
            directory,
            device=device,
            router_weights=router_weights,
            background_remover=background_remover,
            options=options,
        )
        add_to(engine)
    return engine


def load_model(
    directory: Path,
    *,
    device: str,
    router_weights: Path,
    background_remover: Path | None = None,
    options: LoadOptions = DEFAULTS,
) -> Callable[[Engine], None]:
    """Load a model directory as `load_engine` does. Any thread may call this while an engine is in use.

    The returned function measures the model and adds it to an engine, in the thread that uses the engine. It raises
    WeightsError if the model leaves no room.
    """
    torch_device = _use(device)
    folder = router_weights / directory.name
    if not folder.is_dir():
        logger.warning("%s has no router folder %s, so exact is its only budget", directory.name, folder)
    base, loras = options.source(directory)
    entry, index = family_of(base)
    if loras and entry.layout != DIFFUSERS:
        raise WeightsError(f"{base} takes no adapters ({', '.join(loras)}): only diffusers pipelines do")
    dtype = _compute_dtype(options.weights, device)
    manifest = read_manifest(folder)
    family: Family = entry.family.load().load(
        directory, str(torch_device), dtype, load_router_weights(folder, base), manifest.traits, options
    )
    if options.has_float8:
        family.exact_tolerance = max(family.exact_tolerance, FLOAT8_TOLERANCE)
    if options.offloads_layers:
        family.keep_blocks_on_host(torch_device)
    family.forecast_table = read_forecast_table(folder)
    family.background_remover = background_remover

    def add_to(engine: Engine) -> None:
        card = _card(family, entry.name, base, index, folder, manifest, options)
        limit = _memory_limit(torch_device, options)
        engine.add(family, replace(card, memory=replace(card.memory, limit=limit)))
        if isinstance(family, ImageFamily):
            family.prompt_cache = engine.prompt_cache  # after the card: encoding was measured without it
        logger.info("loaded %s on %s in %s, weights: %s", directory.name, device, dtype, options.weights)

    return add_to


def _use(device: str) -> torch.device:
    """Make a GPU the current device of this thread. Raises DeviceError if there is none of that name."""
    found = find_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    return found


def _compute_dtype(weights: Weights, device: str) -> torch.dtype:
    if weights in (Weights.FLOAT32, Weights.BFLOAT16):
        return torch.float32 if weights is Weights.FLOAT32 else torch.bfloat16
    return torch.float32 if device == "cpu" else torch.bfloat16


def _memory_limit(device: torch.device, options: LoadOptions) -> float:
    """The most bytes of the device that its models and their requests may take together."""
    limit = math.inf if options.device_memory is None else float(options.device_memory)
    if device.type == "cuda":
        limit = min(limit, torch.cuda.get_device_properties(device).total_memory)
    return limit


def family_of(directory: Path) -> tuple[FamilyEntry, Path]:
    """The family of a model directory, and the file that names its class. Raises WeightsError if there is none."""
    entries = FAMILIES.values()
    layouts = list(dict.fromkeys(entry.layout for entry in entries))
    for layout in layouts:
        found: NamedClass | None = layout.named_class.load()(directory)
        if found is None:
            continue
        for entry in entries:
            if entry.layout == layout and found.class_name in entry.class_names:
                return entry, found.file
        served = ", ".join(name for entry in entries for name in entry.class_names)
        raise WeightsError(f"{found.file} names the class {found.class_name}; served are: {served}")
    marks = " nor ".join(layout.mark for layout in layouts)
    raise WeightsError(f"{directory} is no model directory: it has neither {marks}")


def model_directories(folder: Path) -> list[Path]:
    """The folders in `folder` that hold a model of some family."""

    def holds_model(directory: Path) -> bool:
        try:
            family_of(directory)
        except (WeightsError, OSError):
            return False
        return True

    return sorted(directory for directory in folder.glob("*/") if holds_model(directory))


def _card(
    family: Family,
    family_name: str,
    directory: Path,
    index: Path,
    folder: Path,
    manifest: Manifest,
    options: LoadOptions,
) -> ModelCard:
    """The card, with the measured time of a step. `index` is the file that names the model's class."""
    curve = read_curve(folder, family.quality_metric)
    rules = tuple(name for name, rule in RULES.items() if family.routers or not rule.needs_scores)
    if missing := {point.policy.rule for point in curve} - {*rules}:
        raise WeightsError(
            f"{folder}: the calibration is of rule {', '.join(missing)}; the model has {', '.join(rules)}"
        )
    if any(point.steps for point in curve) and not family.forecast_table:
        raise WeightsError(
            f"{folder}: the curve forecasts steps, but there is no forecast.safetensors; calibrate again"
        )
    if family.forecast_table:
        rules = (FORECAST, *rules)
    basics = ModelCard(
        id=family.model_id,
        family=family_name,
        license=manifest.license or published_terms(directory) or "unknown",
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
        fixed_share=0.0,
        encode_seconds=math.inf,
        max_batch_size=8,
        memory=family.memory(),
        joins_branches=family.joins_branches,
    )
    card = family.card(basics, manifest)
    if options.compiles:
        family.compile_blocks(_requests_to_compile_for(family, card))
    peaks = PeakMeter(family.device)
    alone_s, pair_s = _dense_step_seconds(family, card, peaks)
    encode_s, picture_s, decode_s = _encode_and_decode_seconds(family, card, peaks)
    card = replace(
        card,
        dense_step_seconds=alone_s,
        fixed_share=fixed_share(alone_s, pair_s),
        encode_seconds=encode_s,
        memory=_measured(card, family, peaks),
    )
    if not isinstance(card, ImageCard):
        return card
    edit_steps = _edit_steps(family.forecast_table) if family.forecast_table else ()
    return replace(
        card,
        decode_seconds=decode_s,
        picture_seconds=picture_s,
        edit_steps=edit_steps,
        can_be_transparent=family.background_remover is not None,
    )


def _requests_to_compile_for(family: Family, card: ModelCard) -> list[GenerationRequest]:
    """Requests that lead to all inputs that blocks can get: prompts of one length and of two, one row and several."""
    request = family.example_request(card)
    if not isinstance(request, ImageRequest):
        return [request, request]
    return [request, replace(request, prompt="a picture of some words more than none")]


def _measured(card: ModelCard, family: Family, peaks: "PeakMeter") -> ModelMemory:
    """The model's memory with the peaks that were measured. On a CPU there are none."""
    if not peaks.measured:
        return card.memory
    alone, pair, *decode = peaks.measured
    request = family.example_request(card)
    return card.memory.measured(request, alone=alone, pair=pair, decode=max(decode, default=0))


class PeakMeter:
    """Measures how many bytes of a GPU something takes at its peak, on top of what was there. On a CPU, nothing."""

    def __init__(self, device: torch.device) -> None:
        self.measured: list[int] = []
        self._device = device

    @contextmanager
    def measuring(self) -> Iterator[None]:
        if self._device.type != "cuda":
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        yield
        self.measured.append(torch.cuda.max_memory_allocated(self._device) - before)


def _edit_steps(table: ForecastTable) -> tuple[tuple[int, ...], ...]:
    """`ImageCard.edit_steps`."""
    forecaster, steps = table.forecaster(table.sigmas, has_conditionals=table.has_conditionals), table.num_steps
    counts = range(1, steps + 1)
    return tuple(tuple(forecaster.num_needed(taken, computed) for computed in counts) for taken in counts)


def fixed_share(alone_s: float, pair_s: float) -> float:
    """The share of a step's time that does not grow with its rows, from the times of one request and of two.

    With c for a call and r for a row, one row takes c + r and two take c + 2 r.
    """
    return min(max(2 - pair_s / alone_s, 0.0), 1.0)


def _dense_step_seconds(family: Family, card: ModelCard, peaks: PeakMeter) -> tuple[float, float]:
    """Seconds of one dense step of one request and of two, at the card's defaults.

    The first step of each warms up. The time of one is that of its fastest step. The time of two follows from it by the
    median ratio. One and two take turns, since another program may slow the machine for a while: a wrong ratio would
    keep requests from sharing steps for as long as the server lives.
    """
    request = replace(family.example_request(card), num_inference_steps=5)
    engine = Engine({card.id: family}, {})
    groups = [[family.start(request, (EXACT,), EXACT) for _ in range(size)] for size in (1, 2)]
    for states in groups:
        for state in states:
            state.exact_tolerance = None  # so that they share their calls
        with peaks.measuring():
            engine.step(states)
    turns = [[engine.step(states).seconds for states in groups] for _ in range(groups[0][0].num_steps - 1)]
    alone_s = min(alone for alone, _ in turns)
    return alone_s, alone_s * statistics.median(pair / alone for alone, pair in turns)


def _encode_and_decode_seconds(family: Family, card: ModelCard, peaks: PeakMeter) -> tuple[float, float, float]:
    """Seconds to encode a request at the card's defaults, to encode a picture to edit, and to decode to a PNG file.

    Each is the faster of two, the first of which warms up. A mesh is not decoded here, since that may take a minute.
    """
    request = replace(family.example_request(card), num_inference_steps=1)
    engine, encode_s, picture_s, decode_s = Engine({card.id: family}, {}), math.inf, math.inf, math.inf
    for _ in range(2):
        state, seconds = _timed_start(family, request)
        encode_s = min(encode_s, seconds)
        if isinstance(card, ImageCard):
            engine.step([state])
            began = time.perf_counter()
            with peaks.measuring():
                pixels = engine.finish(state)
            assert not isinstance(pixels, CleanMesh)
            file = encode_image(pixels, OutputFormat.PNG)
            decode_s = min(decode_s, time.perf_counter() - began)
            if card.edits is Edits.NOISED:
                assert isinstance(request, ImageRequest)
                edited = replace(request, edit=ImageEdit((file,), None, 1.0))
                picture_s = min(picture_s, _picture_seconds(family, edited))
    return encode_s, picture_s if math.isfinite(picture_s) else 0.0, decode_s


@torch.inference_mode()
def _picture_seconds(family: Family, request: ImageRequest) -> float:
    """Seconds to read and encode the picture, and to put noise on it. Drawing the noise alone takes next to nothing."""
    branches = family.encode(request)
    began = time.perf_counter()
    family.begin(request, branches)
    return time.perf_counter() - began


def _timed_start(family: Family, request: GenerationRequest) -> tuple[DenoiseState, float]:
    began = time.perf_counter()
    state = family.start(request, (EXACT,), EXACT)
    return state, time.perf_counter() - began
