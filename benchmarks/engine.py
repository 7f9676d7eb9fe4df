"""How much time does elasticity save, and what does it cost in quality?

Four measurements in one run of `python -m benchmarks.engine`:

time     the stock diffusers transformer, our loop at `exact`, every preset, and compute caps take turns in every round,
         on the same latents and prompts; a ratio compares within a round, and its median over rounds is reported; with
         --compile each also with compiled blocks, the stock transformer's by `compile_repeated_blocks`
quality  prompt accuracy by the judge, PSNR and SSIM against the exact image of the same seed, on held-out prompts;
         SSIM is `Engine.similarity`, the `quality` of curves and receipts
effort   compute of one object on a plain background and of four on a busy one, at the same settings
negative for models with true guidance: how many images have the background that the negative prompt names
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import diffusers.utils.logging
import numpy as np
import torch
from diffusers import DiffusionPipeline, QwenImagePipeline
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from benchmarks.contenders import Contender, Denoising, contenders, decisions, elastic_denoise, time_in_turn
from benchmarks.environment import environment
from benchmarks.table import TableRow, finish, show
from models.budget import resolve
from models.card import Guidance, ImageCard
from models.curve import Preset
from models.engine import Engine
from models.load_options import LoadOptions
from models.report import GenerationSummary
from models.request import Budget, ImageRequest, PresetBudget
from models.zoo import load_engine
from training.scenes.accuracy import Reading
from training.scenes.judge import SHIPPED_JUDGE, Judge, load_judge
from training.scenes.prompts import complex_scenes, evaluation_scenes, simple_scenes
from training.scenes.scenes import TEXTURES, TONES, Scene
from training.scenes.similarity import psnr

_BATCH_SIZE = 8
_CAPTIONS: Mapping[str, Callable[[Scene], str]] = {
    "flux": lambda scene: scene.caption,
    "qwen_image": lambda scene: scene.mixed_caption,
}


class Runners(NamedTuple):
    """What contenders run on: our engine and the stock pipeline."""

    engine: Engine
    pipeline: DiffusionPipeline


def requests_for(
    engine: Engine, model: str, scenes: Sequence[Scene], budget: Budget, side: int | None = None
) -> list[ImageRequest]:
    card = engine.cards[model]
    assert isinstance(card, ImageCard)
    caption_of = _CAPTIONS[card.family]
    return [
        ImageRequest(
            model=model,
            prompt=caption_of(scene),
            height=side or card.default_height,
            width=side or card.default_width,
            num_inference_steps=card.default_num_inference_steps,
            guidance_scale=card.default_guidance_scale,
            seed=seed,
            budget=budget,
            point=resolve(budget, card.curve),
            is_guided=card.is_guided(card.default_guidance_scale),
        )
        for seed, scene in enumerate(scenes)
    ]


def stock_inputs(
    pipeline: DiffusionPipeline, requests: Sequence[ImageRequest], max_sequence_length: int
) -> dict[str, Any]:
    """The arguments of the stock pipeline's call, with encoded prompts. The call then takes denoise time alone.

    They serve for one call, which uses up the random generators. It returns latents `(batch, tokens, channels)` as its
    `images`.
    """
    request, prompts = requests[0], [r.prompt for r in requests]
    inputs: dict[str, Any] = {
        "height": request.height,
        "width": request.width,
        "num_inference_steps": request.num_inference_steps,
        "generator": [torch.Generator().manual_seed(r.seed) for r in requests],
        "output_type": "latent",
    }
    with torch.inference_mode():
        if isinstance(pipeline, QwenImagePipeline):
            inputs["true_cfg_scale"] = request.guidance_scale
            for prefix, texts in (("", prompts), ("negative_", [""] * len(prompts))):
                embeds, mask = pipeline.encode_prompt(texts, max_sequence_length=max_sequence_length)
                inputs |= {f"{prefix}prompt_embeds": embeds, f"{prefix}prompt_embeds_mask": mask}
        else:
            embeds, pooled, _ = pipeline.encode_prompt(prompts, None, max_sequence_length=max_sequence_length)
            inputs |= {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            inputs["guidance_scale"] = request.guidance_scale
    return inputs


def stock_denoise(pipeline: DiffusionPipeline, requests: Sequence[ImageRequest], max_sequence_length: int) -> float:
    """Seconds that the stock pipeline takes from encoded prompts to latents."""
    inputs = stock_inputs(pipeline, requests, max_sequence_length)
    started = time.perf_counter()
    pipeline(**inputs)
    return time.perf_counter() - started


def measure_time(
    runners: Mapping[bool, Runners],
    names: Sequence[Contender],
    model: str,
    side: int,
    batch_size: int,
    num_rounds: int,
) -> list[TableRow]:
    """The rows of `time_in_turn`, with columns for side and batch size. `runners` are for `Contender.is_compiled`."""
    scenes = evaluation_scenes(batch_size * (num_rounds + 1), 0)

    def denoise(contender: Contender, number: int) -> Denoising:
        engine, pipeline = runners[contender.is_compiled]
        chosen = scenes[number * batch_size : (number + 1) * batch_size]
        requests = requests_for(engine, model, chosen, contender.budget or PresetBudget(Preset.EXACT), side)
        if contender.budget is None:
            return Denoising(stock_denoise(pipeline, requests, engine.max_sequence_length(model)))
        return elastic_denoise(engine, requests)

    rows = time_in_turn(names, num_rounds, f"time at {side}, batch {batch_size}", denoise)
    return [{"name": row.pop("name"), "side": side, "batch_size": batch_size, **row} for row in rows]


def generate(
    engine: Engine, requests: Sequence[ImageRequest], tick: Callable[[int], object]
) -> tuple[NDArray[np.uint8], list[GenerationSummary]]:
    """Images `(count, height, width, 3)` and the summary of each request."""
    images, summaries = [], []
    for first in range(0, len(requests), _BATCH_SIZE):
        states = [engine.start(request) for request in requests[first : first + _BATCH_SIZE]]
        while not states[0].is_done:
            engine.step(states)
        images += [np.asarray(engine.finish(state)) for state in states]
        summaries += [state.summary() for state in states]
        tick(len(states))
    return np.stack(images), summaries


def _as_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Images `(count, height, width, 3)` as `(count, 3, height, width)` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def similarities(
    engine: Engine, model: str, images: NDArray[np.uint8], exact: NDArray[np.uint8]
) -> list[tuple[float, float]]:
    """PSNR in dB and SSIM of each image against the exact one."""
    in_db = psnr(_as_tensor(images), _as_tensor(exact)).tolist()
    return [(p, engine.similarity(model, a, b)) for p, a, b in zip(in_db, images, exact, strict=True)]


def measure_quality(
    engine: Engine, judge: Judge, names: Sequence[Contender], model: str, num_single: int, num_multi: int
) -> list[TableRow]:
    """One row per contender: compute, decisions, prompt accuracy (one object, several objects), PSNR and SSIM."""
    groups = {"single": evaluation_scenes(num_single, 0), "multi": evaluation_scenes(0, num_multi)}
    rows: list[TableRow] = []
    exact: dict[str, NDArray[np.uint8]] = {}
    names = [c for c in names if c.budget]
    with tqdm(total=len(names) * (num_single + num_multi), desc="quality") as bar:
        for contender in names:
            assert contender.budget is not None
            row: TableRow = {"name": contender.name}
            everything: list[GenerationSummary] = []
            pairs: list[tuple[float, float]] = []
            for group, scenes in groups.items():
                images, summaries = generate(engine, requests_for(engine, model, scenes, contender.budget), bar.update)
                exact.setdefault(group, images)
                accuracy = judge.score(scenes, _as_tensor(images))
                row[f"{group}_object"], row[f"{group}_scene"] = accuracy.per_object, accuracy.per_scene
                everything += summaries
                pairs += similarities(engine, model, images, exact[group])
            rows.append({**row, **decisions(everything), **_similarity(pairs)})
    return rows


def _similarity(pairs: Sequence[tuple[float, float]]) -> TableRow:
    typical = statistics.median(p for p, _ in pairs)
    return {
        "psnr": typical if math.isfinite(typical) else "identical",
        "ssim": statistics.mean(s for _, s in pairs),
    }


def measure_effort(engine: Engine, model: str, count: int) -> list[TableRow]:
    """Mean compute of simple and complex scenes at every elastic preset, with equal seeds."""
    rows: list[TableRow] = []
    for contender in contenders(engine, model, ()):
        if not isinstance(contender.budget, PresetBudget) or contender.budget.preset is Preset.EXACT:
            continue
        simple, busy = (
            _compute_ratios(engine, requests_for(engine, model, scenes, contender.budget))
            for scenes in (simple_scenes(count), complex_scenes(count))
        )
        low, high = statistics.mean(simple), statistics.mean(busy)
        error = ((statistics.variance(simple) + statistics.variance(busy)) / count) ** 0.5
        rows.append({"name": contender.name, "simple": low, "complex": high, "difference": high - low, "error": error})
    return rows


def _compute_ratios(engine: Engine, requests: Sequence[ImageRequest]) -> list[float]:
    _, summaries = generate(engine, requests, lambda _: None)
    return [summary.compute_ratio for summary in summaries]


def measure_negative(engine: Engine, judge: Judge, model: str, count: int) -> list[TableRow]:
    """For each background, the share of images with its texture or tone, without and with it as the negative prompt.

    The prompts name one object and leave the background open.
    """
    scenes = [replace(scene, mentions_background=False) for scene in evaluation_scenes(count, 0)]
    rows: list[TableRow] = []
    for preset in (Preset.EXACT, Preset.FAST):
        requests = requests_for(engine, model, scenes, PresetBudget(preset))

        def read(negative_prompt: str | None, requests: Sequence[ImageRequest] = requests) -> list[Reading]:
            with_prompt = [replace(request, negative_prompt=negative_prompt) for request in requests]
            return judge.read(_as_tensor(generate(engine, with_prompt, lambda _: None)[0]))

        without = read(None)
        for texture, tone in tqdm(list(zip(TEXTURES, (*TONES, TONES[-1]), strict=True)), desc=f"negative at {preset}"):
            kept = read(f"a {texture} {tone} background")
            rows.append(
                {
                    "name": str(preset),
                    "background": f"{texture} {tone}",
                    "texture_without": sum(reading.texture == texture for reading in without) / count,
                    "texture_with": sum(reading.texture == texture for reading in kept) / count,
                    "tone_without": sum(reading.tone == tone for reading in without) / count,
                    "tone_with": sum(reading.tone == tone for reading in kept) / count,
                }
            )
    return rows


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/tiny-flux"))
    parser.add_argument("--judge", type=Path, default=SHIPPED_JUDGE)
    parser.add_argument("--router-weights", type=Path, default=Path("router_weights"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=128, help="one-object prompts, and as many with two to four")
    parser.add_argument("--caps", type=float, nargs="*", default=[0.5], help="compute_ratio budgets beside the presets")
    parser.add_argument("--time", nargs="+", metavar="NAME", help="time only the stock transformer and these budgets")
    parser.add_argument("--compile", action="store_true", help="time each with compiled blocks too")
    parser.add_argument("--only", choices=("time", "quality", "effort", "negative"))
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def measure_times(
    engine: Engine, names: Sequence[Contender], model: str, arguments: argparse.Namespace
) -> list[TableRow]:
    """The rows of all sizes and batch sizes."""
    runners = {False: Runners(engine, _stock(arguments.model))}
    timed = [c for c in names if not (c.budget and arguments.time) or c.name in arguments.time]
    if arguments.compile:
        options = LoadOptions(compiles=True)
        compiled = load_engine(
            [arguments.model], device="cpu", router_weights=arguments.router_weights, options=options
        )
        runners[True] = Runners(compiled, _stock(arguments.model))
        runners[True].pipeline.transformer.compile_repeated_blocks()
        timed += [replace(c, name=f"{c.name}, compiled", is_compiled=True) for c in timed]
    return [
        row
        for side in arguments.sides
        for batch_size in arguments.batches
        for row in measure_time(runners, timed, model, side, batch_size, arguments.rounds)
    ]


def _stock(directory: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(directory, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    arguments = parse_arguments()
    diffusers.utils.logging.set_verbosity_error()  # the stock pipeline warns at every call that a batch has no mask
    engine = load_engine([arguments.model], device="cpu", router_weights=arguments.router_weights)
    model = arguments.model.name
    result: dict[str, object] = {"benchmark": "engine", "model": model, "environment": environment()}
    names = contenders(engine, model, arguments.caps)

    def measure(name: str, title: str, rows: Callable[[], list[TableRow]]) -> None:
        if arguments.only in (None, name):
            result[name] = found = rows()
            show(title, found)

    def quality() -> list[TableRow]:
        return measure_quality(engine, load_judge(arguments.judge), names, model, arguments.prompts, arguments.prompts)

    measure("time", "Denoise time over the stock transformer's", lambda: measure_times(engine, names, model, arguments))
    measure("quality", "Quality", quality)
    measure("effort", "Compute of simple and complex scenes", lambda: measure_effort(engine, model, 48))
    if engine.cards[model].guidance is Guidance.TRUE:
        measure(
            "negative",
            "Backgrounds without and with a negative prompt that names them",
            lambda: measure_negative(engine, load_judge(arguments.judge), model, 48),
        )
    finish(result, arguments.json)


if __name__ == "__main__":
    main()
