"""What published models do on a fake GPU, and what it costs: bytes, kernels and waits of each part of a request's life.

Text encoders, transformers and VAEs have their published sizes, and are loaded as directories are. Not covered: models
that read pictures beside the noise, edits, the times that `load_engine` measures for cards, and files of results. The
field of a mesh is noise on its coarse grid, and empty beyond that.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import diffusers.utils.logging
import numpy as np
import torch
import transformers.utils.logging
from PIL import Image
from torch import Tensor, nn

from models.curve import EXACT, ComputedSteps, CurvePoint, Preset
from models.elastic.router import RouterStack
from models.engine import Engine
from models.families import FAMILIES
from models.families.family import Family
from models.float8 import Float8Linear
from models.load_options import DEFAULTS, LoadOptions
from models.request import GenerationRequest, ImageRequest, MeshRequest, PresetBudget
from models.rules.forecast import ForecastTable
from models.rules.router import RouterPolicy
from models.state import DenoiseState
from models.weights import CheckpointTraits, RouterWeights
from service.scheduling.memory import step_bytes
from tests.fake_cuda.device import FakeGpu, Watch
from tests.fake_cuda.published import DIRECTORIES, Depth

NUM_STEPS = 8
ROUTED = CurvePoint(RouterPolicy(skip_threshold=0.3, reuse_band=0.2, max_reuses=2), 0.5, 0.5, 0.9, 0.9)
FORECAST = CurvePoint(EXACT.policy, 0.5, 0.5, 0.9, 0.9, steps=ComputedSteps(4, NUM_STEPS))
PROMPTS = ("a red circle", "a small blue square on the left", "a green triangle on the right", "the large circle")


@dataclass(frozen=True, slots=True)
class Model:
    """A published model. `routers` are the number and width of its blocks."""

    name: str
    family: str
    routers: tuple[int, int]
    is_guided: bool = False

    @property
    def is_mesh(self) -> bool:
        return self.family == "hunyuan3d"


MODELS = {
    model.name: model
    for model in (
        Model("flux-dev", "flux", (57, 3072)),
        Model("qwen-image", "qwen_image", (60, 3072), is_guided=True),
        Model("hunyuan3d-2.1", "hunyuan3d", (21, 2048), is_guided=True),
        Model("hunyuan3d-2.0", "hunyuan3d", (48, 1024), is_guided=True),
    )
}


@dataclass(frozen=True, slots=True)
class Cost:
    """`peak_bytes` is what was in use at most beyond what was in use before, `kept_bytes` what stays in use."""

    peak_bytes: int
    kept_bytes: int
    kernels: int
    waits: int


class Loaded:
    """A model on a fake GPU. `gpu.in_use()` must surround all that is done with it."""

    def __init__(
        self,
        model: Model,
        folder: Path,
        options: LoadOptions = DEFAULTS,
        device: str = "cuda:0",
        *,
        routers: bool = True,
    ) -> None:
        """`folder` is where its directory is written, if it is not there yet; other options may need another one."""
        self.model, self.gpu = model, FakeGpu()
        # Transformers reports every file that it reads, to the terminal.
        transformers.utils.logging.disable_progress_bar()
        diffusers.utils.logging.disable_progress_bar()
        directory = folder / model.name
        if not directory.exists():
            depth = Depth(1 if options.offloads_text_encoders else 100, 2 if options.offloads_layers else 100)
            DIRECTORIES[model.name](directory, depth)
        with self.gpu.in_use() as watch, ExitStack() as patches:
            if options.has_float8 and not options.offloads_layers:
                patches.enter_context(patch.object(Float8Linear, "store", _store_zeros))
            with torch.device(device):
                stack = RouterStack(*model.routers).to(torch.bfloat16) if routers else None
            self.family: Family = (
                FAMILIES[model.family]
                .family.load()
                .load(
                    directory,
                    device,
                    torch.bfloat16,
                    RouterWeights(stack) if stack else None,
                    CheckpointTraits(),
                    options,
                )
            )
            del stack
            if options.offloads_layers:
                self.family.keep_blocks_on_host(torch.device(device))
        self.family.forecast_table = _forecast_table(is_guided=model.is_guided)
        self.weight_bytes = watch.live
        self.memory = self.family.memory()
        self.compared = {"weights": (self.weight_bytes, self.memory.weights)}
        self.engine = Engine({model.name: self.family}, {model.name: _Card()})  # type: ignore[dict-item]

    @property
    def watch(self) -> Watch:
        return self.gpu.watch

    def request(self, number: int, side: int = 1024) -> GenerationRequest:
        common: dict[str, Any] = {
            "model": self.model.name,
            "num_inference_steps": NUM_STEPS,
            "guidance_scale": 4.0,
            "seed": number,
            "budget": PresetBudget(Preset.EXACT),
            "point": EXACT,
            "is_guided": self.model.is_guided,
        }
        if self.model.is_mesh:
            return MeshRequest(**common, input_image=_disc(), octree_resolution=384)
        return ImageRequest(**common, prompt=PROMPTS[number % len(PROMPTS)], height=side, width=side)

    def start(self, points: Sequence[CurvePoint], side: int = 1024) -> list[DenoiseState]:
        return [self.engine.start(self.request(number, side), point) for number, point in enumerate(points)]

    def compare(self, name: str, before: int, points: Sequence[CurvePoint]) -> None:
        """Note the peak since the last restart beside the formula's, for requests of which `before` was without."""
        requests = [replace(self.request(number), point=point) for number, point in enumerate(points)]
        memories = [
            self.memory.of(request, reuses_blocks=point.policy.may_reuse, forecasts_steps=bool(point.steps))
            for request, point in zip(requests, points, strict=True)
        ]
        if name == "decode":
            formula = sum(memory.finished + memory.decode + memory.grid for memory in memories)
        else:
            formula = sum(memory.running for memory in memories) + step_bytes(memories)
        self.compared[name] = self.watch.peak - before, formula

    def cost(self, action: Callable[[], Any]) -> tuple[Cost, Any]:
        watch = self.watch
        watch.restart()
        before = watch.live
        result = action()
        cost = Cost(watch.peak - before, watch.live - before, watch.kernels.total(), watch.waits.total())
        return cost, result


def run(loaded: Loaded) -> Iterator[tuple[str, Cost]]:
    """The costs of a model's scenarios by name. The GPU must be in use."""
    engine, before = loaded.engine, loaded.watch.live
    short = replace(loaded.request(0), num_inference_steps=3)
    cost, alone = loaded.cost(lambda: engine.start(short, EXACT))
    yield "start", cost
    engine.step([alone])
    yield "dense step", loaded.cost(lambda: engine.step([alone]))[0]
    loaded.compare("dense step", before, [EXACT])
    yield "preview", loaded.cost(lambda: engine.preview(alone)())[0]
    while not alone.is_done:
        engine.step([alone])
    yield "decode", loaded.cost(lambda: decode(engine, alone))[0]
    loaded.compare("decode", before, [EXACT])
    yield "mixed step", mixed_step(loaded)


def mixed_step(loaded: Loaded) -> Cost:
    """A step of requests under every rule: dense, by routers twice, forecast. Routers decide at random."""
    before, points = loaded.watch.live, [EXACT, ROUTED, ROUTED, FORECAST]
    states = loaded.start(points)
    loaded.engine.step(states[1:])  # one step later, residuals are re-used
    cost, report = loaded.cost(lambda: loaded.engine.step(states))
    loaded.compare("mixed step", before, points)
    assert states[-1].num_forecast_steps
    blocks = report.blocks
    for count in ("num_run", "num_skipped", "num_reused"):
        assert sum(getattr(block, count) for block in blocks), count
    assert len({width for block in blocks for width in block.mlp_widths}) > 1
    return cost


def decode(engine: Engine, state: DenoiseState) -> object:
    """Image or field, as the worker decodes it."""
    turns = engine.decode_in_turns(state)
    if turns is None:
        return engine.finish(state)
    for _ in turns:
        pass
    return None


def measure(name: str) -> dict[str, Any]:
    """The costs of a model's scenarios, as JSON has them, its weights' bytes, and what was mixed up.

    The process must have loaded the guard.
    """
    with TemporaryDirectory() as folder:
        loaded = Loaded(MODELS[name], Path(folder))
        with loaded.gpu.in_use() as watch:
            costs = {scenario: asdict(cost) for scenario, cost in run(loaded)}
        return {
            "weight_bytes": loaded.weight_bytes,
            "costs": costs,
            "faults": dict(watch.faults),
            "compared": loaded.compared,
        }


def _store_zeros(layer: Float8Linear, weight: Tensor, device: str | torch.device) -> None:
    """`Float8Linear.store` of a weight that is all zero, without reading it. It takes no memory on the host."""
    numbers = torch.zeros((), dtype=torch.int8).expand(weight.shape)
    layer.weight = nn.Parameter(numbers.to(device), requires_grad=False)
    layer.scale = torch.tensor(1.0, device=device)


class _Card:
    """The part of a card that the engine reads: `start` gives points, and nothing limits the memory."""

    memory = SimpleNamespace(room=math.inf)

    @staticmethod
    def curve_for(request: GenerationRequest) -> Sequence[CurvePoint]:
        return (EXACT, FORECAST)


def _forecast_table(*, is_guided: bool) -> ForecastTable:
    size = (3 if is_guided else 2) * NUM_STEPS + 1
    gram = np.eye(size) + np.ones((size, size))
    return ForecastTable(np.linspace(1, 0, NUM_STEPS + 1), gram, np.ones(NUM_STEPS + 1))


def _disc(side: int = 256) -> bytes:
    line, file = np.linspace(-1, 1, side), BytesIO()
    is_disc = np.hypot(line, line[:, None]) < 0.8
    Image.fromarray(np.where(is_disc[..., None], (128, 128, 128, 255), 0).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
