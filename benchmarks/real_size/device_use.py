"""The sections about the device: kernels and waits of a step, and bytes against the formula."""

from collections.abc import Iterator

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.real_size.section import Setting, Table
from benchmarks.real_size.steps import Runner, Way, begin
from benchmarks.real_size.subjects import Subject, requests
from benchmarks.table import TableRow
from models.engine import Engine
from models.zoo import PeakMeter

_NUM_STEPS = 2
_GIB = 2**30


def host(setting: Setting) -> Iterator[Table]:
    """What does a step ask of the host and of the device?

    Runs of two steps, over two: `operators` that the host called, `kernels` that the device ran and their
    `kernel_seconds`, and `waits`, calls of CUDA that return when something has ended there. On a CPU there are only
    operators.
    """
    ways = {
        "stock": (Way(stock_steps=_NUM_STEPS), 1),
        "exact": (Way(), 1),
        "dense": (Way(shares_calls=True), 1),
        "routers 0.5": (Way(share=0.5), 1),
        "routers 0.5, 4 mixed": (Way(share=0.5, is_mixed=True), 4),
    }
    for family, scale, _ in setting.image_models():
        runner = Runner(family)
        rows = [{"name": name, **_profiled(runner, *way, scale.sides[0])} for name, way in ways.items()]
        yield Table(f"{family.model_id} at {scale.sides[0]}x{scale.sides[0]}, a step", rows)


def _profiled(runner: Runner, way: Way, batch_size: int, side: int) -> TableRow:
    runner.denoise(way, side, batch_size, _NUM_STEPS)
    is_cuda = runner.family.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        _, cost = runner.denoise(way, side, batch_size, _NUM_STEPS)
    events = profiler.events()
    operators = [e for e in events if e.device_type == DeviceType.CPU and e.name.startswith("aten::")]
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith("Mem")]
    waits = [e for e in events if e.name.startswith("cuda") and "Synchronize" in e.name]
    return {
        "profiled_seconds": cost.seconds / _NUM_STEPS,
        "operators": len(operators) / _NUM_STEPS,
        "kernels": len(kernels) / _NUM_STEPS if is_cuda else None,
        "kernel_seconds": sum(e.time_range.elapsed_us() for e in kernels) / 1e6 / _NUM_STEPS if is_cuda else None,
        "waits": len(waits) / _NUM_STEPS if is_cuda else None,
    }


def memory(setting: Setting) -> Iterator[Table]:
    """Are the bytes of weights, requests, steps and decodings those of the formula? On a CPU, the formula alone."""
    is_cuda = setting.device.type == "cuda"
    before = torch.cuda.memory_allocated(setting.device) if is_cuda else 0
    for family, scale, _ in setting.image_models():
        setting.free()  # what is left of the model before
        weights = torch.cuda.memory_allocated(setting.device) - before if is_cuda else None
        rows = [_bytes("weights", family.memory().weights, weights)]
        for side in scale.sides:
            rows += _request_bytes(family, side)
        yield Table(f"memory of {family.model_id}", rows)


def _request_bytes(family: Subject, side: int) -> list[TableRow]:
    (request,) = requests(family, side, 1, _NUM_STEPS)
    engine, device = Engine({family.model_id: family}, {}), family.device
    peaks, rows = PeakMeter(device), []
    for name, way in (("exact", Way()), ("dense", Way(shares_calls=True)), ("routers 0.5", Way(share=0.5))):
        formula = family.memory().of(request, reuses_blocks=way.share is not None, forecasts_steps=False)
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        (state,) = begin(family, way, side, 1, _NUM_STEPS)
        engine.step([state])
        running = torch.cuda.memory_allocated(device) - held if device.type == "cuda" else None
        with peaks.measuring():
            engine.step([state])
        step = peaks.measured.pop() if peaks.measured else None
        rows += [
            _bytes(f"{name} at {side}: running", formula.running, running),
            _bytes(f"{name} at {side}: step", formula.step, step),
        ]
    with peaks.measuring():
        engine.finish(state)
    rows.append(_bytes(f"decode at {side}", formula.decode, *peaks.measured))
    return rows


def _bytes(name: str, formula: int, measured: int | None = None) -> TableRow:
    return {
        "name": name,
        "formula_gib": formula / _GIB,
        "measured_gib": None if measured is None else measured / _GIB,
        "ratio": measured / formula if measured is not None else None,
    }
