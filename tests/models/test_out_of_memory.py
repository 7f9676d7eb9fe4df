"""Memory can run out at any allocation of a start, a step or a decoding. Nothing is left of what failed."""

import random
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.curve import ComputedSteps, CurvePoint
from models.device_errors import DeviceErrors
from models.engine import Engine
from models.errors import DeviceLost, OutOfDeviceMemory
from models.request import GenerationRequest
from models.rules.dense import DensePolicy
from models.rules.router import RouterPolicy
from models.state import DenoiseState

Ask = Callable[..., GenerationRequest]
Guided = Callable[..., dict[str, Any]]

ROUTED = CurvePoint(RouterPolicy(0.3, 0.3, 2, width_bias=0.5), 0.5, 0.5, 0.5, 0.5)
FORECAST = CurvePoint(DensePolicy(), 0.5, 0.5, 0.5, 0.5, steps=ComputedSteps(4, 8))


KINDS = pytest.mark.parametrize("kind", ["flux", "qwen_image", "hunyuan3d_plain"], indirect=True, scope="session")
ONE_KIND = pytest.mark.parametrize("kind", ["flux"], indirect=True, scope="session")


class Memory(TorchDispatchMode):
    """Runs out at allocating call number `last`, counted from 0. `made` has the storages that the calls before made."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it without types
        self.last = last
        self.num_calls = 0
        self.made: list[weakref.ref[torch.UntypedStorage]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func._schema.is_mutable:
            return func(*args, **kwargs)
        if self.num_calls == self.last:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.num_calls += 1
        result = func(*args, **kwargs)
        self.made += [weakref.ref(t.untyped_storage()) for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result

    @property
    def num_left(self) -> int:
        return sum(trace() is not None for trace in self.made)


@pytest.fixture(scope="module")
def companions(engine: Engine, ask: Ask, guided: Guided) -> list[DenoiseState]:
    """In the middle of their ways, with stored residuals and velocities."""
    states = [
        engine.start(ask(seed=1, num_inference_steps=8, prompt="red", **guided()), ROUTED),
        engine.start(ask(seed=3, num_inference_steps=8), FORECAST),
    ]
    for _ in range(2):
        engine.step(states)
    return states


def contents(state: DenoiseState) -> list[object]:
    """All that a step changes, but for residuals of blocks that run in it: these are gone before they run."""
    velocities = [id(tensor) for velocity in state.velocities for tensor in velocity]
    accounts: list[object] = [(row.spent_flops, len(row.trace), row.journal) for row in state.rows]
    return [id(state.latents), id(state.prediction), velocities, accounts, state.summary()]


def residuals(states: Sequence[DenoiseState]) -> set[int]:
    return {id(residual) for state in states for row in state.rows for residual in row.residuals.values()}


def half_of(num_calls: int) -> list[int]:
    """Random half of the calls, always the same, and the last three. Blocks repeat their calls, so all kinds are in."""
    return sorted({*random.Random(0).sample(range(num_calls), num_calls // 2), *range(num_calls - 3, num_calls)})


@KINDS
def test_step_can_fail_at_any_allocation(engine: Engine, companions: list[DenoiseState]) -> None:
    expected, memory = [state.fork() for state in companions], Memory()
    with memory:
        engine.step(expected)
    assert memory.num_calls > 100
    for last in half_of(memory.num_calls):
        states = [state.fork() for state in companions]
        before = [contents(state) for state in states]
        with (
            pytest.raises(OutOfDeviceMemory, match=r"a denoise step .*; 2.00 GiB more") as failure,
            Memory(last) as left,
        ):
            engine.step(states)
        assert left.num_left == 0, failure
        assert [contents(state) for state in states] == before
        assert residuals(states) <= residuals(companions)
        if last % 25 and last < memory.num_calls - 3:
            continue
        engine.step(states)
        for ours, theirs in zip(states, expected, strict=True):
            assert torch.equal(ours.latents, theirs.latents)
            assert ours.summary() == theirs.summary()


@KINDS
def test_start_and_decoding_can_fail_at_any_allocation(engine: Engine, ask: Ask) -> None:
    request = ask(num_inference_steps=1)

    def made() -> tuple[DenoiseState, Any]:
        state = engine.start(request)
        while not state.is_done:
            engine.step([state])
        return state, engine.quality_sample(state)

    done, expected = made()
    calls: list[tuple[str, Callable[[], object], int]] = [
        ("starting", lambda: engine.start(request), 2),  # the scheduler keeps its last noise levels and timesteps
        ("decoding", lambda: engine.finish(done), 0),
    ]
    for doing, call, most_left in calls:
        with Memory() as memory:
            kept = call()
        for last in half_of(memory.num_calls):
            with pytest.raises(OutOfDeviceMemory, match=doing) as failure, Memory(last) as left:
                call()
            assert left.num_left <= most_left, failure
        del kept
        assert memory.num_left <= most_left
    assert np.array_equal(made()[1], expected)


@ONE_KIND
def test_device_that_fails_another_call_too_is_lost(monkeypatch: pytest.MonkeyPatch, ask: Ask) -> None:
    asked: list[torch.device] = []
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with")

    def synchronize(device: torch.device) -> None:
        asked.append(device)
        if len(asked) > 1:
            raise error

    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    errors = DeviceErrors("a step of", ask(), torch.device("cuda:1"))
    with pytest.raises(torch.AcceleratorError), errors:
        raise error
    with pytest.raises(DeviceLost, match=r"illegal memory access was encountered$"), errors:
        raise error
    assert asked == [torch.device("cuda:1")] * 2
