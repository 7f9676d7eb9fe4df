"""The sections that time denoising: exact results, savings, batches, and a decoding beside the steps."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from threading import Event, Thread

import torch

from benchmarks.real_size.section import Setting, Table
from benchmarks.real_size.steps import SHARES, Runner, Way, begin, synchronize
from benchmarks.real_size.subjects import CALIBRATED_STEPS, Subject, requests
from benchmarks.table import TableRow
from models.curve import EXACT, ComputedSteps, CurvePoint
from models.engine import Engine
from models.state import DenoiseState

_MOST_ROUNDS = 7


def exact(setting: Setting) -> Iterator[Table]:
    """Are exact results those of the stock pipeline, bit for bit, and in the same time? Compiled blocks too."""
    for family, scale, has_time in setting.image_models(has_routers=False):
        side, num_steps = scale.sides[0], 4
        compiled = copy.copy(family)
        compiled.compile_blocks(requests(family, side, 1, num_steps))
        ways = {
            "stock": Way(stock_steps=num_steps),
            "exact": Way(),
            "stock compiled": Way(stock_steps=num_steps, is_compiled=True),
            "exact compiled": Way(is_compiled=True),
        }
        runner = Runner(family, compiled)
        rows = []
        stock = runner.denoise(ways["stock"], side, 1, num_steps)[0]
        for row in runner.time(ways, side, 1, num_steps, _MOST_ROUNDS, has_time):
            latents = runner.denoise(ways[str(row["name"])], side, 1, num_steps)[0]
            difference = (latents - stock).abs().max().item()
            rows.append({**row, "difference": difference, "is_bitwise_equal": torch.equal(latents, stock)})
        yield Table(f"{family.model_id} at {side}x{side}, {num_steps} steps", rows)


def savings(setting: Setting) -> Iterator[Table]:
    """Does time follow compute, for forecast steps, for blocks left out by routers, and for fewer steps of stock?"""
    for family, scale, has_time in setting.image_models():
        side, num_steps = scale.sides[0], CALIBRATED_STEPS
        ways = {"stock": Way(stock_steps=num_steps), "exact": Way(), "routers 1": Way(share=1.0)}
        for share in SHARES:
            num_computed = round(share * num_steps)
            ways[f"forecasts {share}"] = Way(point=_forecast(num_computed, num_steps))
            ways[f"routers {share}"] = Way(share=share)
            ways[f"fewer steps {share}"] = Way(stock_steps=num_computed)
        rows = Runner(family).time(ways, side, 1, num_steps, _MOST_ROUNDS, has_time)
        yield Table(f"{family.model_id} at {side}x{side}, {num_steps} steps", rows)


def _forecast(num_computed: int, num_steps: int) -> CurvePoint:
    share = num_computed / num_steps
    return CurvePoint(EXACT.policy, share, share, 0.9, 0.9, steps=ComputedSteps(num_computed, num_steps))


def batches(setting: Setting) -> Iterator[Table]:
    """What does a batch cost: of exact requests, of those that share calls, of equal plans and of mixed ones?"""
    num_steps = 2  # blocks are re-used in the second
    ways = {
        "stock": Way(stock_steps=num_steps),
        "exact": Way(),
        "dense": Way(shares_calls=True),
        "routers 0.5, equal": Way(share=0.5),
        "routers 0.5, mixed": Way(share=0.5, is_mixed=True),
    }
    for family, scale, has_time in setting.image_models():
        runner = Runner(family)
        for side in scale.sides:
            for batch_size in (1, 2, 4):
                rows = runner.time(ways, side, batch_size, num_steps, 3, has_time)
                yield Table(f"{family.model_id} at {side}x{side}, batch {batch_size}", rows)


def overlap(setting: Setting) -> Iterator[Table]:
    """How much longer do steps take while another thread decodes, on a stream of its own?"""
    for family, scale, has_time in setting.image_models(has_routers=False):
        engine = Engine({family.model_id: family}, {})
        done = begin(family, Way(), scale.sides[0], 1, 1)[0]
        engine.step([done])
        engine.finish(done)  # warms up
        began = time.perf_counter()
        engine.finish(done)
        rows: list[TableRow] = [{"name": "decode alone", "seconds": time.perf_counter() - began, "decodings": 1}]
        alone = _step_seconds(family, engine, scale.sides[0], has_time)
        rows.append({"name": "step alone", "seconds": alone, "decodings": 0})
        with _Decoding(engine, done) as decoding:
            beside = _step_seconds(family, engine, scale.sides[0], has_time)
        rows.append({"name": "step beside decodings", "seconds": beside, "decodings": decoding.count})
        yield Table(f"{family.model_id} at {scale.sides[0]}x{scale.sides[0]}", rows)


class _Decoding:
    """Decodes again and again in another thread, and counts. Raises what that raised."""

    def __init__(self, engine: Engine, state: DenoiseState) -> None:
        self.count = 0
        self._engine, self._state, self._ends = engine, state, Event()
        self._fault: BaseException | None = None
        self._thread = Thread(target=self._decode)

    def __enter__(self) -> "_Decoding":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()
        if self._fault:
            raise self._fault

    def _decode(self) -> None:
        try:
            while not self._ends.is_set():
                self._engine.finish(self._state)
                self.count += 1
        except BaseException as fault:
            self._fault = fault


def _step_seconds(family: Subject, engine: Engine, side: int, has_time: Callable[[], bool]) -> float:
    """The median of up to twelve dense steps of one request. The first warms up."""
    (state,) = begin(family, Way(), side, 1, 13)
    seconds: list[float] = []
    while not state.is_done and (len(seconds) < 3 or has_time()):
        synchronize(family.device)
        seconds.append(engine.step([state]).seconds)
    return statistics.median(seconds[1:])
