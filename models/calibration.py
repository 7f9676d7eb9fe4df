"""Measures a model's curve: the cost of each policy of a rule, and the similarity of its results to the exact ones."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from models.card import ImageCard, MeshCard, ModelCard
from models.curve import EXACT, CurvePoint, Preset
from models.elastic.plan import Policy
from models.engine import Engine
from models.errors import InvalidRequest
from models.request import GenerationRequest, ImageRequest, MeshRequest, PresetBudget
from models.rules import ladder
from models.weights import read_manifest, write_curve
from models.zoo import load_engine

_PRESET_COMPUTE = {Preset.HIGH: 0.8, Preset.BALANCED: 0.6, Preset.FAST: 0.45, Preset.DRAFT: 0.25}
_LEAST_SAVING = 0.015
_BATCH_SIZE = 8
_NUM_TIMED = 5


def calibrate_model(
    directory: Path,
    samples: Sequence[str | bytes],
    *,
    rule: str,
    device: str,
    router_weights: Path,
    offload_text_encoders: bool = False,
) -> Path:
    """Calibrate a model directory and write the curve beside its routers. Returns the path of `calibration.json`.

    `samples` are prompts for an image model, image files for a mesh model. Raises InvalidRequest if there are none, or
    if the model has nothing of this rule to calibrate.
    """
    engine = load_engine(
        [directory], device=device, router_weights=router_weights, offload_text_encoders=offload_text_encoders
    )
    card = engine.cards[directory.name]
    published = read_manifest(router_weights / card.id).published_policies
    rules = [name for name in card.rules if ladder(name, published)]
    if rule not in rules:
        raise InvalidRequest(f"{card.id} has no rule '{rule}' to calibrate; try {', '.join(rules)}", "rule")
    if not samples:
        raise InvalidRequest("there are no samples to calibrate on; give at least one prompt or image", "samples")
    requests = [_request(card, sample, seed) for seed, sample in enumerate(samples)]
    curve = calibrate(engine, requests, rule=rule, published=published)
    measured = {
        "num_samples": len(requests),
        "num_inference_steps": card.default_num_inference_steps,
        "guidance_scale": card.default_guidance_scale,
        "device": device,
        "torch": torch.__version__,
    }
    if isinstance(card, ImageCard):
        measured["size"] = f"{card.default_width}x{card.default_height}"
    return write_curve(router_weights / card.id, curve, card.quality_metric, measured)


def calibrate(
    engine: Engine, requests: Sequence[GenerationRequest], *, rule: str, published: Sequence[Policy] = ()
) -> tuple[CurvePoint, ...]:
    """Measure the model of `requests` under every policy of `rule`.

    The curve keeps the policies that no other beats in both compute and quality, from exact to the cheapest, so it
    descends strictly. Of policies that cost nearly the same it keeps the best. Every policy is printed when measured.
    """
    model = requests[0].model
    metric = engine.cards[model].quality_metric
    exact, _ = _generate(engine, requests, EXACT)
    points = []
    for policy in ladder(rule, published):
        point = CurvePoint(policy, 1.0, 1.0, 1.0)
        quality_samples, ratios = _generate(engine, requests, point)
        quality = statistics.mean(engine.similarity(model, a, b) for a, b in zip(quality_samples, exact, strict=True))
        points.append(replace(point, compute_ratio=statistics.mean(ratios), quality=quality))
        print(f"compute {points[-1].compute_ratio:.3f}  {metric} {quality:.4f}  {policy}", flush=True)
    return _time(engine, requests[:_NUM_TIMED], (EXACT, *name_presets(thinned(efficient(points)))))


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
    """Name the point nearest to each preset's compute, among the points after the preset before it.

    `curve` descends. A short curve has no point for some presets.
    """
    named = list(curve)
    first = 0
    for preset, compute_ratio in _PRESET_COMPUTE.items():
        if first < len(named):
            best = min(range(first, len(named)), key=lambda i: abs(named[i].compute_ratio - compute_ratio))
            named[best] = replace(named[best], preset=preset)
            first = best + 1
    return named


def _request(card: ModelCard, sample: str | bytes, seed: int) -> GenerationRequest:
    """A request with the card's defaults for a prompt or an image file."""
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
            return ImageRequest(**common, prompt=sample, height=card.default_height, width=card.default_width)
        case MeshCard(), bytes():
            return MeshRequest(**common, input_image=sample, octree_resolution=card.default_octree_resolution)
    wanted = "prompts" if isinstance(card, ImageCard) else "images"
    raise InvalidRequest(f"{card.id} makes {card.modality} results; it is calibrated on {wanted}", "samples")


def _generate(
    engine: Engine, requests: Sequence[GenerationRequest], point: CurvePoint
) -> tuple[list[NDArray[Any]], list[float]]:
    """Quality samples and compute ratios of the requests at one point."""
    quality_samples, ratios = [], []
    for first in range(0, len(requests), _BATCH_SIZE):
        states = [engine.start(request, point) for request in requests[first : first + _BATCH_SIZE]]
        while not states[0].is_done:
            engine.step(states)
        quality_samples += [engine.quality_sample(state) for state in states]
        ratios += [state.summary().compute_ratio for state in states]
    return quality_samples, ratios


def _time(engine: Engine, requests: Sequence[GenerationRequest], curve: Sequence[CurvePoint]) -> tuple[CurvePoint, ...]:
    """Fill in `relative_seconds`: each point's denoise time over exact's, one request at a time, points interleaved."""
    seconds: list[list[float]] = [[] for _ in curve]
    for request in requests:
        for times, point in zip(seconds, curve, strict=True):
            state = engine.start(request, point)
            started = time.perf_counter()
            while not state.is_done:
                engine.step([state])
            times.append(time.perf_counter() - started)
    ratios = [[t / exact for t, exact in zip(times, seconds[0], strict=True)] for times in seconds]
    return tuple(replace(p, relative_seconds=statistics.median(r)) for p, r in zip(curve, ratios, strict=True))
