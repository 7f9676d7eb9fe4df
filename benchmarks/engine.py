"""How much time does elasticity save, and what does it cost in quality?

Three measurements in one run of `python -m benchmarks.engine`:

time     the stock diffusers transformer, our loop at `exact`, every preset and compute caps, interleaved round by
         round on the same latents and prompts; a ratio is a round's own, and its median over rounds is reported
quality  prompt accuracy by the judge, PSNR and SSIM against the exact picture of the same seed, on held-out prompts
effort   compute for one object on a plain background against four on a busy one, at the same settings
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline
from torch import Tensor
from tqdm import tqdm

from benchmarks.environment import environment
from models.engine import Engine, load_engine
from models.report import GenerationSummary
from models.request import Budget, ComputeBudget, GenerationRequest, Preset, PresetBudget
from training.judge import Judge, load_judge
from training.prompts import complex_scenes, evaluation_scenes, simple_scenes
from training.scenes import Scene
from training.similarity import psnr, ssim

_BATCH_SIZE = 8


Row = dict[str, float | str]


@dataclass(frozen=True, slots=True)
class Contender:
    """What is measured: a name and the budget that asks for it; None is the stock transformer."""

    name: str
    budget: Budget | None


def contenders(engine: Engine, model: str, caps: Sequence[float]) -> list[Contender]:
    presets = [point.preset for point in engine.cards[model].curve if point.preset]
    return [
        Contender("stock", None),
        *(Contender(str(preset), PresetBudget(preset)) for preset in presets),
        *(Contender(f"compute {cap:g}", ComputeBudget(cap)) for cap in caps),
    ]


def requests_for(
    engine: Engine, model: str, scenes: Sequence[Scene], budget: Budget, side: int | None = None
) -> list[GenerationRequest]:
    card = engine.cards[model]
    return [
        GenerationRequest(
            model,
            scene.caption,
            side or card.default_height,
            side or card.default_width,
            card.default_num_inference_steps,
            card.default_guidance_scale,
            seed,
            budget,
        )
        for seed, scene in enumerate(scenes)
    ]


@torch.inference_mode()
def stock_denoise(pipeline: FluxPipeline, requests: Sequence[GenerationRequest], max_sequence_length: int) -> float:
    """Seconds of the stock denoise loop: the transformer and scheduler calls of FluxPipeline, nothing else."""
    request = requests[0]
    prompt_embeds, pooled, text_ids = pipeline.encode_prompt(
        [r.prompt for r in requests], None, max_sequence_length=max_sequence_length
    )
    generators = [torch.Generator().manual_seed(r.seed) for r in requests]
    channels = pipeline.transformer.config.in_channels // 4
    latents, image_ids = pipeline.prepare_latents(
        len(requests), channels, request.height, request.width, torch.float32, "cpu", generators
    )
    steps = request.num_inference_steps
    pipeline.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=1.0)
    pipeline.scheduler.set_begin_index(0)
    guidance = torch.full([len(requests)], request.guidance_scale)
    started = time.perf_counter()
    for timestep in pipeline.scheduler.timesteps:
        velocity = pipeline.transformer(
            hidden_states=latents,
            timestep=timestep.expand(len(requests)) / 1000,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=prompt_embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        latents = pipeline.scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return time.perf_counter() - started


def elastic_denoise(engine: Engine, requests: Sequence[GenerationRequest]) -> tuple[float, float, float]:
    """Seconds, mean compute ratio and the routers' seconds of our denoise loop."""
    states = [engine.start(request) for request in requests]
    router_seconds = 0.0
    started = time.perf_counter()
    while not states[0].is_done:
        router_seconds += engine.step(states).router_seconds
    seconds = time.perf_counter() - started
    return seconds, statistics.mean(state.summary().compute_ratio for state in states), router_seconds


def measure_time(
    engine: Engine,
    pipeline: FluxPipeline,
    names: Sequence[Contender],
    model: str,
    side: int,
    batch_size: int,
    num_rounds: int,
) -> list[Row]:
    """Rows of name, compute ratio, seconds and time ratio over stock: medians, and the middle four fifths."""
    scenes = evaluation_scenes(batch_size * (num_rounds + 1), 0)
    runs: dict[str, list[tuple[float, float, float]]] = {c.name: [] for c in names}
    max_length = engine.max_sequence_length(model)
    for number in tqdm(range(num_rounds + 1), desc=f"time at {side}, batch {batch_size}"):
        chosen = scenes[number * batch_size : (number + 1) * batch_size]
        first = number % len(names)  # nobody always comes after the same one
        for contender in (*names[first:], *names[:first]):
            requests = requests_for(engine, model, chosen, contender.budget or PresetBudget(Preset.EXACT), side)
            if contender.budget is None:
                measured = stock_denoise(pipeline, requests, max_length), 1.0, 0.0
            else:
                measured = elastic_denoise(engine, requests)
            if number:  # the first round warms up
                runs[contender.name].append(measured)
    rows: list[Row] = []
    for name, own in runs.items():
        times, compute, router_seconds = zip(*own, strict=True)
        stock_times = [run[0] for run in runs["stock"]]
        ratios = sorted(t / stock for t, stock in zip(times, stock_times, strict=True))
        rows.append(
            {
                "name": name,
                "side": side,
                "batch_size": batch_size,
                "compute_ratio": statistics.mean(compute),
                "seconds": statistics.median(times),
                "time_ratio": statistics.median(ratios),
                "time_ratio_low": ratios[len(ratios) // 10],
                "time_ratio_high": ratios[-1 - len(ratios) // 10],
                "router_share": statistics.median(router_seconds) / statistics.median(stock_times),
            }
        )
    return rows


def generate(
    engine: Engine, requests: Sequence[GenerationRequest], tick: Callable[[int], object]
) -> tuple[Tensor, list[GenerationSummary]]:
    """Pictures `(count, 3, height, width)` in [-1, 1] and what each request got."""
    pictures, summaries = [], []
    for first in range(0, len(requests), _BATCH_SIZE):
        states = [engine.start(request) for request in requests[first : first + _BATCH_SIZE]]
        while not states[0].is_done:
            engine.step(states)
        pictures += [torch.from_numpy(engine.finish(state)) for state in states]
        summaries += [state.summary() for state in states]
        tick(len(states))
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1, summaries


def measure_quality(
    engine: Engine, judge: Judge, names: Sequence[Contender], model: str, num_single: int, num_multi: int
) -> list[Row]:
    """Rows of name, compute, decisions, prompt accuracy of one-object and of other prompts, PSNR and SSIM."""
    groups = {"single": evaluation_scenes(num_single, 0), "multi": evaluation_scenes(0, num_multi)}
    rows: list[Row] = []
    exact: dict[str, Tensor] = {}
    names = [c for c in names if c.budget]
    with tqdm(total=len(names) * (num_single + num_multi), desc="quality") as bar:
        for contender in names:
            assert contender.budget is not None
            row: Row = {"name": contender.name}
            everything, likeness = [], []
            for group, scenes in groups.items():
                pictures, summaries = generate(
                    engine, requests_for(engine, model, scenes, contender.budget), bar.update
                )
                exact.setdefault(group, pictures)
                accuracy = judge.score(scenes, pictures)
                row[f"{group}_object"], row[f"{group}_scene"] = accuracy.per_object, accuracy.per_scene
                everything += summaries
                likeness += list(zip(psnr(pictures, exact[group]), ssim(pictures, exact[group]), strict=True))
            rows.append({**row, **_decisions(everything), **_likeness(likeness)})
    return rows


def _decisions(summaries: Sequence[GenerationSummary]) -> dict[str, float]:
    total = sum(s.num_run + s.num_skipped + s.num_reused for s in summaries)
    return {
        "compute_ratio": statistics.mean(s.compute_ratio for s in summaries),
        "skip_rate": sum(s.num_skipped for s in summaries) / total,
        "reuse_rate": sum(s.num_reused for s in summaries) / total,
        "mean_mlp_width": statistics.mean(s.mean_mlp_width for s in summaries),
    }


def _likeness(pairs: Sequence[tuple[float, float]]) -> Row:
    typical = statistics.median(float(p) for p, _ in pairs)
    return {
        "psnr": typical if math.isfinite(typical) else "identical",
        "ssim": statistics.mean(float(s) for _, s in pairs),
    }


def measure_effort(engine: Engine, model: str, count: int) -> list[Row]:
    """Mean compute of simple and complex scenes at every elastic preset, same seeds."""
    rows: list[Row] = []
    for contender in contenders(engine, model, ()):
        if not isinstance(contender.budget, PresetBudget) or contender.budget.preset is Preset.EXACT:
            continue
        simple, busy = (
            [
                summary.compute_ratio
                for summary in generate(engine, requests_for(engine, model, scenes, contender.budget), lambda _: None)[
                    1
                ]
            ]
            for scenes in (simple_scenes(count), complex_scenes(count))
        )
        low, high = statistics.mean(simple), statistics.mean(busy)
        error = ((statistics.variance(simple) + statistics.variance(busy)) / count) ** 0.5
        rows.append({"name": contender.name, "simple": low, "complex": high, "difference": high - low, "error": error})
    return rows


def show(title: str, rows: Sequence[Row]) -> None:
    print(f"\n{title}")
    print("  ".join(f"{key:>14}" for key in rows[0]))
    for row in rows:
        print("  ".join(f"{v:>14.4f}" if isinstance(v, float) else f"{v:>14}" for v in row.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("checkpoints/tiny-flux"))
    parser.add_argument("--judge", type=Path, default=Path("checkpoints/judge"))
    parser.add_argument("--router-weights", type=Path, default=Path("router_weights"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=128, help="one-object prompts, and as many with two to four")
    parser.add_argument("--caps", type=float, nargs="*", default=[0.5], help="compute_ratio budgets beside the presets")
    parser.add_argument("--time", nargs="+", metavar="NAME", help="time only the stock transformer and these")
    parser.add_argument("--only", choices=("time", "quality", "effort"))
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    engine = load_engine([arguments.model], device="cpu", router_weights=arguments.router_weights)
    model = arguments.model.name
    result: dict[str, object] = {"benchmark": "engine", "model": model, "environment": environment()}
    names = contenders(engine, model, arguments.caps)
    if arguments.only in (None, "time"):
        pipeline = FluxPipeline.from_pretrained(arguments.model, dtype=torch.float32)
        timed = [c for c in names if not (c.budget and arguments.time) or c.name in arguments.time]
        rows = [
            row
            for side in arguments.sides
            for batch_size in arguments.batches
            for row in measure_time(engine, pipeline, timed, model, side, batch_size, arguments.rounds)
        ]
        result["time"] = rows
        show("Denoise time over the stock transformer's", rows)
    if arguments.only in (None, "quality"):
        judge = load_judge(arguments.judge)
        rows = measure_quality(engine, judge, names, model, arguments.prompts, arguments.prompts)
        result["quality"] = rows
        show("Quality", rows)
    if arguments.only in (None, "effort"):
        rows = measure_effort(engine, model, 48)
        result["effort"] = rows
        show("Compute of simple and complex scenes", rows)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
