"""Measuring a model's curve: what each setting of its rule costs, and how near its pictures stay to the exact ones."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from skimage.metrics import structural_similarity

from models.budget import resolve
from models.card import EXACT, CurvePoint, Policy
from models.engine import Engine, load_engine
from models.errors import InvalidRequest
from models.request import ComputeBudget, GenerationRequest, Preset, PresetBudget
from models.weights import read_manifest, write_curve

QUALITY_METRIC = "ssim"
_PRESET_COMPUTE = {Preset.HIGH: 0.8, Preset.BALANCED: 0.6, Preset.FAST: 0.45, Preset.DRAFT: 0.25}
_BATCH_SIZE = 8
_NUM_TIMED = 5


def settings_of(rule: str, published: Sequence[Policy] = ()) -> list[list[Policy]]:
    """Policies to try, in groups that differ in thresholds only, so that places between two of a group make sense.

    For `router` each of the `published` policies has a group of its own.
    """
    if rule == "router":
        thresholds = (0.05, 0.15, 0.25, 0.4, 0.55, 0.7)
        without_reuse = [Policy(skip_threshold=t, width_bias=bias) for bias in (0.0, 2.0) for t in thresholds]
        with_reuse = [
            Policy(skip_threshold=threshold, reuse_band=band, max_reuses=3)
            for band in (0.1, 0.25, 0.4)
            for threshold in thresholds
        ]
        as_published = [
            [replace(policy, skip_threshold=t) for t in sorted({*thresholds, policy.skip_threshold})]
            for policy in published
        ]
        return [without_reuse, with_reuse, *as_published]
    return [
        [
            Policy(residual_threshold=threshold, max_reuses=reuses, protected_first=1)
            for threshold in (0.03, 0.06, 0.1, 0.15, 0.25, 0.4)
        ]
        for reuses in (1, 2, 4, 8)
    ]


def calibrate_model(
    directory: Path,
    prompts: Sequence[str],
    *,
    rule: str,
    device: str,
    router_weights: Path,
    offload_text_encoders: bool = False,
) -> Path:
    """Calibrate a model directory and write the curve beside its routers. Returns the path of `calibration.json`."""
    engine = load_engine(
        [directory], device=device, router_weights=router_weights, offload_text_encoders=offload_text_encoders
    )
    model = directory.name
    if rule not in engine.cards[model].rules or rule == "dense":
        raise InvalidRequest(f"{model} has no rule '{rule}' to calibrate; try residual_cache", "rule")
    if not prompts:
        raise InvalidRequest("there are no prompts to calibrate on; give at least one", "prompts")
    published = read_manifest(router_weights / model).published_policies
    curve = calibrate(engine, model, prompts, rule=rule, published=published)
    card = engine.cards[model]
    measured = {
        "num_prompts": len(prompts),
        "size": f"{card.default_width}x{card.default_height}",
        "num_inference_steps": card.default_num_inference_steps,
        "guidance_scale": card.default_guidance_scale,
        "device": device,
        "torch": torch.__version__,
    }
    return write_curve(router_weights / model, curve, QUALITY_METRIC, measured)


def calibrate(
    engine: Engine, model: str, prompts: Sequence[str], *, rule: str, published: Sequence[Policy] = ()
) -> tuple[CurvePoint, ...]:
    """Measure `model` under every setting of `rule`, on `prompts` at the model's default size, steps and guidance.

    Of the best group of settings it keeps those that none beats in both compute and quality, from exact to the
    cheapest, so the curve is strictly monotone. Every setting is printed as it is measured.
    """
    requests = [_request(engine, model, prompt, seed) for seed, prompt in enumerate(prompts)]
    exact, _ = _generate(engine, requests, EXACT)
    groups = []
    for policies in settings_of(rule, published):
        points = []
        for policy in policies:
            point = CurvePoint(rule, policy, 1.0, 1.0, 1.0)
            pictures, ratios = _generate(engine, requests, point)
            quality = statistics.mean(similarity(a, b) for a, b in zip(pictures, exact, strict=True))
            points.append(replace(point, compute_ratio=statistics.mean(ratios), quality=quality))
            print(f"compute {points[-1].compute_ratio:.3f}  {QUALITY_METRIC} {quality:.4f}  {policy}", flush=True)
        groups.append(efficient(points))
    best = max((group for group in groups if group), key=mean_preset_quality)
    return _time(engine, requests[:_NUM_TIMED], (EXACT, *name_presets(best)))


def mean_preset_quality(curve: Sequence[CurvePoint]) -> float:
    """Mean quality at the presets' compute ratios: what decides between groups of settings."""
    return statistics.mean(resolve(ComputeBudget(ratio), curve).quality for ratio in _PRESET_COMPUTE.values())


def efficient(points: Iterable[CurvePoint]) -> list[CurvePoint]:
    """The points that none beats in both compute and quality, dearest first: strictly descending in both."""
    kept: list[CurvePoint] = []
    for point in sorted(points, key=lambda p: (p.compute_ratio, -p.quality)):
        if point.compute_ratio < 1 and point.quality < 1 and (not kept or point.quality > kept[-1].quality):
            kept.append(point)
    return kept[::-1]


def name_presets(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Give each preset the point whose compute is nearest to the preset's, of those cheaper than the preset before it.

    `curve` descends; a short one does not name every preset.
    """
    named = list(curve)
    first = 0
    for preset, compute_ratio in _PRESET_COMPUTE.items():
        if first < len(named):
            best = min(range(first, len(named)), key=lambda i: abs(named[i].compute_ratio - compute_ratio))
            named[best] = replace(named[best], preset=preset)
            first = best + 1
    return named


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    """SSIM of two pictures `(height, width, 3)` uint8 (Wang et al. 2004), over their channels, window 7, uniform."""
    return float(structural_similarity(a, b, channel_axis=2, data_range=255))  # type: ignore[no-untyped-call]  # has none


def _request(engine: Engine, model: str, prompt: str, seed: int) -> GenerationRequest:
    card = engine.cards[model]
    return GenerationRequest(
        model,
        prompt,
        card.default_height,
        card.default_width,
        card.default_num_inference_steps,
        card.default_guidance_scale,
        seed,
        PresetBudget(Preset.EXACT),
    )


def _generate(
    engine: Engine, requests: Sequence[GenerationRequest], point: CurvePoint
) -> tuple[list[np.ndarray], list[float]]:
    """Pictures and compute ratios of the requests at one point."""
    pictures, ratios = [], []
    for first in range(0, len(requests), _BATCH_SIZE):
        states = [engine.start(request, point) for request in requests[first : first + _BATCH_SIZE]]
        while not states[0].is_done:
            engine.step(states)
        pictures += [engine.finish(state) for state in states]
        ratios += [state.summary().compute_ratio for state in states]
    return pictures, ratios


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
