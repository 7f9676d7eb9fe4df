"""Which cards serve the published models: `python -m tests.fake_cuda.cards` counts bytes and prints the table.

The counts are those of fake tensors at 1024x1024. How many requests run at once is what the server would admit by its
own formula, of which it keeps a reserve. A card of N GB counts as N * 10^9 bytes; most have a little more.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from models.card import ModelCard
from models.curve import EXACT, CurvePoint
from models.load_options import LoadOptions, Offload, Weights
from models.memory import ModelMemory
from service.scheduling.memory import num_at_once
from tests.fake_cuda.budgets import process
from tests.fake_cuda.device import GIB
from tests.fake_cuda.scenarios import FORECAST, MODELS, Loaded, decode

FILE = Path("benchmarks/results/fake-cuda-memory.json")
CARDS = (16, 24, 48, 80, 141)
POINTS = {"exact": EXACT, "default": FORECAST}
"""The default budget forecasts steps, once a model is calibrated."""
_MAX_BATCH_SIZE = 8
SETTINGS = {
    "none": LoadOptions(),
    "text_encoders": LoadOptions(offload=Offload.TEXT_ENCODERS),
    "float8": LoadOptions(weights=Weights.FLOAT8),
    "float8, text_encoders": LoadOptions(weights=Weights.FLOAT8, offload=Offload.TEXT_ENCODERS),
    "float8, layers": LoadOptions(weights=Weights.FLOAT8, offload=Offload.LAYERS),
}
NAMES = {
    "flux-dev": "FLUX.1-dev",
    "qwen-image": "Qwen-Image",
    "hunyuan3d-2.1": "Hunyuan3D-2.1",
    "hunyuan3d-2.0": "Hunyuan3D-2.0",
}


def measure_setting(name: str, options: LoadOptions) -> dict[str, Any]:
    """Bytes of a model's weights, and of one request at 1024x1024: at most in use, by budget. The server's formula for
    it, and how many of it are served at once on each card.

    The process must have loaded the guard.
    """
    with TemporaryDirectory() as folder:
        loaded = Loaded(MODELS[name], Path(folder), options, routers=False)
        with loaded.gpu.in_use() as watch:
            rows = {budget: _of_request(loaded, point) for budget, point in POINTS.items()}
        return {"weights": loaded.weight_bytes, **rows, "faults": dict(watch.faults)}


def _of_request(loaded: Loaded, point: CurvePoint) -> dict[str, Any]:
    watch, engine, base = loaded.watch, loaded.engine, loaded.watch.live
    request = replace(loaded.request(0), point=point)
    if point is EXACT:
        request = replace(request, num_inference_steps=2)
    watch.restart()
    state = engine.start(request, point)
    start, running = watch.peak - base, watch.live - base
    step = 0
    while not state.is_done:
        watch.restart()
        engine.step([state])
        step, running = max(step, watch.peak - base), max(running, watch.live - base)
    watch.restart()
    decode(engine, state)
    memory = loaded.family.memory()
    return {
        "start": start,
        "running": running,
        "step": step,
        "decode": watch.peak - base,
        "formula": asdict(memory.of(request, reuses_blocks=False, forecasts_steps=bool(point.steps))),
        "at_once": {str(size): num_at_once(request, _card(loaded, memory, size)) for size in CARDS},
    }


def _card(loaded: Loaded, memory: ModelMemory, size: int) -> ModelCard:
    """A card of a device of `size` GB. Only what decides over memory is right."""
    return ModelCard(
        id=loaded.model.name,
        family=loaded.model.family,
        license="",
        created=0,
        default_num_inference_steps=1,
        default_guidance_scale=1.0,
        max_num_inference_steps=100,
        guidance=loaded.family.guidance,
        rules=(),
        quality_metric="",
        curve=(EXACT,),
        blocks=(),
        dense_step_seconds=math.inf,
        fixed_share=0.0,
        encode_seconds=math.inf,
        max_batch_size=_MAX_BATCH_SIZE,
        memory=replace(memory, limit=size * 1e9, all_weights=memory.weights),
    )


def rows_of(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The table in Markdown. Requests at once, of both budgets where they differ, are at most those of one step."""
    for name, settings in results.items():
        for setting, result in settings.items():
            exact, elastic = result["exact"], result["default"]
            peaks = [f"{max(row['step'], row['decode'], row['start']) / GIB:.1f}" for row in (exact, elastic)]
            served = [_served(exact["at_once"][str(size)], elastic["at_once"][str(size)]) for size in CARDS]
            weights = f"{result['weights'] / GIB:.1f}"
            title = NAMES[name] if setting == "none" else ""
            yield "| " + " | ".join([title, setting, weights, *peaks, *served]) + " |"


def _served(exact: int, elastic: int) -> str:
    texts = [str(min(count, _MAX_BATCH_SIZE) or "-") for count in (exact, elastic)]
    return texts[0] if texts[0] == texts[1] else " / ".join(texts)


def main() -> None:
    results: dict[str, dict[str, Any]] = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name in sys.argv[1:] or MODELS:
        results[name] = {}
        for setting, options in SETTINGS.items():
            with process() as pool:
                results[name][setting] = pool.submit(measure_setting, name, options).result()
            print(name, setting, json.dumps(results[name][setting]), flush=True)
            FILE.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(rows_of(results)))


if __name__ == "__main__":
    main()
