"""Measures a model's curve: what each way to save compute costs, and how similar its results are to the exact ones."""

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from tqdm import tqdm

from models.card import Edits, ImageCard, MeshCard, ModelCard
from models.curve import EXACT, FORECAST, CurvePoint, Preset
from models.engine import Engine
from models.errors import InvalidRequest
from models.load_options import DEFAULTS, LoadOptions
from models.request import GenerationRequest, ImageEdit, ImageRequest, MeshRequest, PresetBudget
from models.rules import ladder
from models.rules.forecast import ForecastTable, read_forecast_table, write_forecast_table
from models.state import DenoiseState
from models.trajectories import (
    BATCH_SIZE,
    follow,
    forecast_point,
    learn,
    learning_steps,
    record,
    steps_to_follow,
    with_forecasts,
)
from models.weights import read_manifest, write_curve
from models.zoo import load_engine

NUM_LEARNED = 16
"""Samples whose trajectories forecasts are learned from. The curve is measured on others."""
NUM_SAMPLES = 48
"""Samples that a calibration takes if it is given none."""
BUILT_IN_SAMPLES = Path(__file__).parent / "calibration_samples"
"""Prompts for image models, and pictures of solids for mesh models. Models made for editing get instructions for the
pictures, which all have one size, so that samples share steps."""
_COMPUTED_SHARES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.65)
_PRESET_QUALITY = {Preset.HIGH: 0.99, Preset.BALANCED: 0.97, Preset.FAST: 0.94, Preset.DRAFT: 0.85}
_LEAST_SAVING = 0.015
_NUM_TIMED = 3


def calibrate_model(
    directory: Path,
    samples: Sequence[str | bytes] | None,
    *,
    rules: Sequence[str] = (FORECAST,),
    device: str,
    router_weights: Path,
    background_remover: Path | None = None,
    options: LoadOptions = DEFAULTS,
) -> Path:
    """Calibrate a model directory, and write what was learned and measured to its router folder.

    `samples` are prompts for an image model, image files for a mesh model; for a model made for editing they are
    instructions, and the pictures are built in. None takes the first `NUM_SAMPLES` of the model's
    `calibration_prompts.txt`, or of the built-in ones. Forecasts are learned from the first `NUM_LEARNED`; the curve is
    measured on the others. An interrupted calibration goes on after its last batch. Returns the path of
    `calibration.json`. Raises InvalidRequest if there are too few samples, or if the model does not have one of the
    rules.
    """
    engine = load_engine(
        [directory],
        device=device,
        router_weights=router_weights,
        background_remover=background_remover,
        options=options,
    )
    card = engine.cards[directory.name]
    folder = router_weights / card.id
    published = read_manifest(folder).published_policies
    offered = [FORECAST, *(name for name in card.rules if name != FORECAST and ladder(name, published))]
    for rule in rules:
        if rule not in offered:
            raise InvalidRequest(f"{card.id} has no rule '{rule}' to calibrate; try {', '.join(offered)}", "rule")
    if samples is None:
        samples = _default_samples(card, folder)[:NUM_SAMPLES]
    num_learned = NUM_LEARNED if FORECAST in rules else 0
    if len(samples) <= num_learned:
        raise InvalidRequest(
            f"{len(samples)} samples are too few to calibrate on; give {num_learned + 1} at least", "samples"
        )
    requests = [_request(card, sample, seed) for seed, sample in enumerate(samples)]
    policies = [policy for rule in rules if rule != FORECAST for policy in ladder(rule, published)]
    blocks = [CurvePoint(policy, 1.0, 1.0, 1.0, 1.0) for policy in policies]
    weights = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(directory.rglob("*"))]
    kept = _opened(folder / "calibration.partial", repr((weights, requests, blocks)))
    calibration = Calibration(engine, requests[:num_learned], requests[num_learned:], blocks, kept)
    curve = calibration.run(device)
    if calibration.table:
        write_forecast_table(folder, calibration.table)
    measured = {
        "num_samples": len(requests) - num_learned,
        "num_inference_steps": card.default_num_inference_steps,
        "guidance_scale": card.default_guidance_scale,
        "device": device,
        "torch": torch.__version__,
    }
    if isinstance(card, ImageCard):
        measured["size"] = f"{card.default_width}x{card.default_height}"
    path = write_curve(folder, curve, card.quality_metric, measured)
    shutil.rmtree(kept)
    return path


def _default_samples(card: ModelCard, folder: Path) -> Sequence[str | bytes]:
    if isinstance(card, MeshCard):
        return [path.read_bytes() for path in _built_in_pictures()]
    own, edits = folder / "calibration_prompts.txt", isinstance(card, ImageCard) and card.edits is Edits.REFERENCE
    built_in = BUILT_IN_SAMPLES / ("edits.txt" if edits else "prompts.txt")
    return (own if own.exists() else built_in).read_text().splitlines()


def _built_in_pictures() -> list[Path]:
    return sorted((BUILT_IN_SAMPLES / "pictures").iterdir())


def _opened(folder: Path, described: str) -> Path:
    """The folder of an unfinished calibration, emptied if that one was of other weights, samples or settings."""
    key, name = hashlib.sha256(described.encode()).hexdigest(), folder / "key"
    if not name.exists() or name.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        name.write_text(key)
    return folder


@dataclass
class Calibration:
    """The calibration of one model on valid requests at its defaults.

    Forecasts are learned from `learned`, none if there are none. The curve is measured on `measured`; `blocks` are the
    points whose steps are all computed. What is done is kept in `folder`.
    """

    engine: Engine
    learned: Sequence[GenerationRequest]
    measured: Sequence[GenerationRequest]
    blocks: Sequence[CurvePoint]
    folder: Path
    table: ForecastTable | None = None

    @torch.inference_mode()
    def run(self, device: str) -> tuple[CurvePoint, ...]:
        """Learn and measure. Says before what it will cost, and shows progress."""
        cost = self._cost(sum(self._nums_computed))
        minutes = cost * self.engine.cards[self.measured[0].model].dense_step_seconds / 60
        print(
            f"{self.measured[0].model}: {len(self.learned)} samples to learn from, {len(self.measured)} to measure; at "
            f"most {cost} steps, as many as {cost / self._num_steps:.0f} exact results have: {minutes:.1f} minutes or "
            f"less on {device}",
            flush=True,
        )
        with tqdm(total=cost, unit="step") as bar:
            if self.learned:
                self._learn(bar)
            results = [self._measure(first, bar) for first in range(0, len(self.measured), BATCH_SIZE)]
        points = []
        for name, point in self._points.items():
            qualities = [quality for batch in results for quality in batch[name]["qualities"]]
            ratios = [ratio for batch in results for ratio in batch[name]["compute_ratios"]]
            points.append(
                replace(
                    point,
                    compute_ratio=statistics.mean(ratios),
                    quality=promised_quality(qualities),
                    mean_quality=statistics.mean(qualities),
                )
            )
            print(f"compute {points[-1].compute_ratio:.3f}  quality {points[-1].quality:.4f}, ", end="")
            print(f"mean {points[-1].mean_quality:.4f}  {name}", flush=True)
        return self._timed((EXACT, *name_presets(thinned(efficient(points)))))

    @cached_property
    def _num_steps(self) -> int:
        return self._start(self.measured[:1])[0].num_steps

    @property
    def _nums_computed(self) -> list[int]:
        return computed_steps(self._num_steps) if self.learned else []

    @cached_property
    def _points(self) -> Mapping[str, CurvePoint]:
        """The points to measure, by their names in `folder`."""
        (example,) = self._start(self.measured[:1])
        forecasts = {f"{num} steps computed": forecast_point(num, example) for num in self._nums_computed}
        return forecasts | {str(point.policy): point for point in self.blocks}

    def _cost(self, num_followed: int) -> int:
        """Steps of one request that are computed, if following all schedules takes `num_followed`."""
        return len(self.measured) * self._cost_to_measure(num_followed) + (
            learning_steps(self._num_steps, len(self.learned), num_followed) if self.learned else 0
        )

    def _cost_to_measure(self, num_followed: int) -> int:
        return self._num_steps * (1 + len(self.blocks)) + num_followed

    def _learn(self, bar: "tqdm[None]") -> None:
        self.table = read_forecast_table(self.folder)
        if self.table is None:
            trajectories = record(self.engine, self._start(self.learned), bar.update)
            self.table = learn(self.engine, partial(self._start, self.learned), trajectories, self._nums_computed, bar)
            write_forecast_table(self.folder, self.table)
        num_left = max(0, len(self.measured) - BATCH_SIZE * len([*self.folder.glob("measured-*.json")]))
        (example,) = with_forecasts(self._start(self.measured[:1]), self.table)
        bar.total = bar.n + num_left * self._cost_to_measure(steps_to_follow(example, self._nums_computed))

    def _measure(self, first: int, bar: "tqdm[None]") -> dict[str, Any]:
        """For each point, by name, the qualities and compute ratios of the batch of requests from `first` on."""
        path = self.folder / f"measured-{first}.json"
        if path.exists():
            kept: dict[str, Any] = json.loads(path.read_text())
            return kept
        requests = self.measured[first : first + BATCH_SIZE]
        exact = [self.engine.quality_sample(state) for state in self._finished(requests, EXACT, bar)]
        found = {}
        if self.table:
            states = with_forecasts(self._start(requests), self.table)
            for num, done in follow(self.engine, states, self._nums_computed, bar.update):
                found[f"{num} steps computed"] = self._compared(done, exact)
        for point in self.blocks:
            found[str(point.policy)] = self._compared(self._finished(requests, point, bar), exact)
        path.write_text(json.dumps(found))
        return found

    def _start(self, requests: Sequence[GenerationRequest], point: CurvePoint = EXACT) -> list[DenoiseState]:
        """States that share their calls: dense results differ from exact ones by rounding alone."""
        states = [self.engine.start(request, point) for request in requests]
        for state in states:
            state.exact_tolerance = None
        return states

    def _finished(
        self, requests: Sequence[GenerationRequest], point: CurvePoint, bar: "tqdm[None]"
    ) -> list[DenoiseState]:
        states = self._start(requests, point)
        while not states[0].is_done:
            self.engine.step(states)
            bar.update(len(states))
        return states

    def _compared(self, states: Sequence[DenoiseState], exact: Sequence[NDArray[Any]]) -> dict[str, list[float]]:
        model = self.measured[0].model
        samples = [self.engine.quality_sample(state) for state in states]
        return {
            "qualities": [self.engine.similarity(model, a, b) for a, b in zip(samples, exact, strict=True)],
            "compute_ratios": [state.compute_ratio for state in states],
        }

    def _timed(self, curve: Sequence[CurvePoint]) -> tuple[CurvePoint, ...]:
        """Fill in `relative_seconds`: each point's time over exact's, one request at a time, points interleaved.

        Where blocks are dense, time follows the number of computed steps, so all such points share one factor. It is
        less noisy than their own times.
        """
        seconds: list[list[float]] = [[] for _ in curve]
        for request in self.measured[:_NUM_TIMED]:
            for times, point in zip(seconds, curve, strict=True):
                (state,) = self._start([request], point)
                if self.table:
                    with_forecasts([state], self.table)
                started = time.perf_counter()
                while not state.is_done:
                    self.engine.step([state])
                times.append(time.perf_counter() - started)
        ratios = [statistics.median(t / exact for t, exact in zip(times, seconds[0], strict=True)) for times in seconds]
        per_compute = [r / p.compute_ratio for p, r in zip(curve[1:], ratios[1:], strict=True) if p.is_block_dense]
        shared = statistics.median(per_compute) if per_compute else 1.0
        shares = [
            point.compute_ratio * shared if point.is_block_dense else ratio
            for point, ratio in zip(curve[1:], ratios[1:], strict=True)
        ]
        return (curve[0], *(replace(p, relative_seconds=s) for p, s in zip(curve[1:], shares, strict=True)))


def computed_steps(num_steps: int) -> list[int]:
    """The numbers of computed steps to calibrate, of a schedule of `num_steps`."""
    return sorted({round(share * num_steps) for share in _COMPUTED_SHARES} & {*range(1, num_steps)})


def promised_quality(qualities: Sequence[float]) -> float:
    """A quality that nine of ten new samples reach, most likely.

    The tenth percentile of few samples is too high for new ones half of the time. So this is the sample quantile at
    half of that share. With 32 samples it is the second lowest, which 88 % of new samples reach with a probability of
    0.92 (a distribution-free tolerance limit, Wilks 1941, https://doi.org/10.1214/aoms/1177731788).
    """
    return sorted(qualities)[max(0, len(qualities) // 16 - 1)]


def efficient(points: Iterable[CurvePoint]) -> list[CurvePoint]:
    """The points that no other beats in both compute and quality, in strictly descending order of both."""
    kept: list[CurvePoint] = []
    for point in sorted(points, key=lambda p: (p.compute_ratio, -p.quality)):
        if point.compute_ratio < 1 and point.quality < 1 and (not kept or point.quality > kept[-1].quality):
            kept.append(point)
    return kept[::-1]


def thinned(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """`curve`, which descends, without points that save less than `_LEAST_SAVING` over the kept point before them."""
    kept: list[CurvePoint] = []
    for point in curve:
        if not kept or point.compute_ratio <= kept[-1].compute_ratio - _LEAST_SAVING:
            kept.append(point)
    return kept


def name_presets(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Name the cheapest point of each preset's quality, among the points after the preset before it.

    `curve` descends. A preset whose quality no such point has gets the first of them, and none if there are none left.
    """
    named = list(curve)
    first = 0
    for preset, quality in _PRESET_QUALITY.items():
        if first < len(named):
            able = [i for i in range(first, len(named)) if named[i].quality >= quality]
            best = able[-1] if able else first
            named[best] = replace(named[best], preset=preset)
            first = best + 1
    return named


def _request(card: ModelCard, sample: str | bytes, seed: int) -> GenerationRequest:
    """A request with the card's defaults for a prompt or an image file.

    For a model made for editing, the prompt is about a built-in picture.
    """
    common: dict[str, Any] = {
        "model": card.id,
        "num_inference_steps": card.default_num_inference_steps,
        "guidance_scale": card.default_guidance_scale,
        "seed": seed,
        "budget": PresetBudget(Preset.EXACT),
        "point": EXACT,
        "is_guided": card.is_guided(card.default_guidance_scale),
    }
    match card, sample:
        case ImageCard(), str():
            edit = None
            if card.edits is Edits.REFERENCE:
                pictures = _built_in_pictures()
                edit = ImageEdit((pictures[seed % len(pictures)].read_bytes(),))
            return ImageRequest(
                **common, prompt=sample, height=card.default_height, width=card.default_width, edit=edit
            )
        case MeshCard(), bytes():
            return MeshRequest(**common, input_image=sample, octree_resolution=card.default_octree_resolution)
    wanted = "prompts" if isinstance(card, ImageCard) else "images"
    raise InvalidRequest(f"{card.id} makes {card.modality} results; it is calibrated on {wanted}", "samples")
