"""A GPU that computes nothing: shapes, types, devices, bytes, kernels and waits of CUDA code, at any size.

Tensors on "cuda" have no data: PyTorch's meta tensors stand behind them. Tensors on the CPU are real. Small tensors on
"cuda" that follow from the CPU's are known, so that masks and lengths are right. What nobody knows is drawn when it is
read.

It finds operations whose inputs are on different devices or, in matrix products, convolutions, attention and norms, of
different types. It can't find races between streams, kernels that a GPU lacks, wrong numbers, or slowness. Peaks leave
out the workspaces of kernels and what PyTorch's allocator loses to fragmentation.
"""

import ctypes
import math
import subprocess
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch._meta_registrations  # the shapes of the results of many operations
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

GIB = 2**30
_KNOWN_ELEMENTS = 2**20
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_ONE_TYPE = ("addmm", "mm", "bmm", "baddbmm", "convolution", "attention", "native_", "_fused_rms_norm")
_ROOT = str(Path(__file__).parents[2])


def load_guard(folder: Path, compiler: str) -> None:
    """Make this process accept "cuda" in a CPU build of PyTorch. It can't be undone."""
    library, torch_folder = folder / "guard.so", Path(torch.__file__).parent
    source = Path(__file__).with_name("guard.cpp")
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-lc10"]
    subprocess.run([compiler, str(source), *flags, "-o", str(library)], check=True)
    ctypes.CDLL(str(library))


class CudaTensor(Tensor):
    """A tensor on a GPU without data: `meta` has its shape and its place in a storage, `known` its values, if any."""

    meta: Tensor
    known: Tensor | None

    @staticmethod
    def __new__(cls, meta: Tensor, device: torch.device, known: Tensor | None = None) -> "CudaTensor":
        tensor: CudaTensor = Tensor._make_wrapper_subclass(
            cls, meta.shape, meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=device
        )
        tensor.meta, tensor.known = meta, known
        return tensor

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.meta.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # PyTorch documents it as a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(f"{func} of a tensor on a fake GPU that is not in use")


class Watch:
    """Counts of what runs on the device. `live` and `peak` are bytes; `waits` and `faults` say where they arose."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._storages: dict[int, object] = {}

    def restart(self) -> None:
        """Count kernels, waits and the peak from here on."""
        self.peak = self.live
        self.kernels.clear()
        self.waits.clear()

    def hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self.live += size
            self.peak = max(self.peak, self.live)
            self._storages[key] = weakref.finalize(storage, partial(self._let_go, key, size))

    def _let_go(self, key: int, size: int) -> None:
        self.live -= size
        del self._storages[key]

    def wait(self, reason: str) -> None:
        self.waits[f"{reason} at {_place()}"] += 1


class FakeGpu(TorchDispatchMode):
    """`with gpu.in_use(): ...` runs CUDA code without a GPU. `logit` is what reading unknown numbers gives, None for
    random numbers in [-4, 4]."""

    def __init__(self, memory_bytes: int = 141 * GIB) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = Watch()
        self.logit: float | None = None
        self.memory_bytes = memory_bytes
        self._shapes: dict[Any, Any] = {}
        self._rng = torch.Generator().manual_seed(0)

    @contextmanager
    def in_use(self) -> Iterator[Watch]:
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") copies from the CPU
        try:
            with ExitStack() as stack:
                for target, name, value in self._stand_ins():
                    stack.enter_context(patch.object(target, name, value))
                stack.enter_context(self)
                yield self.watch
        finally:
            torch._C._set_only_lift_cpu_tensors(lifted)

    def _stand_ins(self) -> list[tuple[Any, str, Any]]:
        watch, cuda = self.watch, torch.cuda
        stream = MagicMock(name="stream", spec=["synchronize", "wait_stream", "wait_event", "record_event", "query"])
        stream.synchronize = lambda: watch.wait("synchronize")
        event = MagicMock(name="event", spec=["synchronize", "record", "wait", "query", "elapsed_time"])
        event.synchronize = stream.synchronize
        event.elapsed_time.return_value = 1.0
        properties = SimpleNamespace(total_memory=self.memory_bytes, name="fake", major=9, minor=0)
        values: dict[str, Any] = {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: (9, 0),
            "synchronize": lambda device=None: watch.wait("synchronize"),
            "mem_get_info": lambda device=None: (self.memory_bytes - watch.live, self.memory_bytes),
            "memory_allocated": lambda device=None: watch.live,
            "memory_reserved": lambda device=None: watch.live,
            "max_memory_allocated": lambda device=None: watch.peak,
            "reset_peak_memory_stats": lambda device=None: None,
            "empty_cache": lambda: None,
            "device": lambda device: nullcontext(),
            "stream": lambda stream: nullcontext(),
            "current_stream": lambda device=None: stream,
            "default_stream": lambda device=None: stream,
            "Stream": lambda *args, **kwargs: stream,
            "Event": lambda *args, **kwargs: event,
        }
        entries: list[tuple[Any, str, Any]] = [(cuda, name, value) for name, value in values.items()]
        return [
            *entries,
            (nn.Module, "_apply", _apply),
            *((torch, name, _unpinned(getattr(torch, name))) for name in ("tensor", "empty", "zeros", "empty_like")),
            (Tensor, "pin_memory", lambda tensor, device=None: tensor),
            (Tensor, "is_pinned", lambda tensor, device=None: True),
            (Tensor, "record_stream", lambda tensor, stream: None),
        ]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = _leaves((*args, *kwargs.values()))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        cuda = [tensor for tensor in inputs if isinstance(tensor, CudaTensor)]
        devices = {tensor.device for tensor in cuda} or {_device(leaf) for leaf in leaves if _is_cuda(leaf)}
        if not devices:
            return func(*args, **kwargs)
        name = func.__name__.partition(".")[0]
        if special := _SPECIAL.get(name):
            with self:
                result = special(self, func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        if _is_composite(func):
            with self:  # inference mode leaves composite operations whole
                return func.decompose(*args, **kwargs)
        self._check(name, inputs, devices)
        known = self._known(func, name, args, kwargs, cuda)
        result, is_new = self._shaped(func, args, kwargs, leaves, next(iter(devices)))
        if (is_new and "empty" not in name) or name.endswith("_"):
            self.watch.kernels[name] += 1
        if known is not None:
            for output, value in zip(_leaves((result,)), _leaves((known,)), strict=True):
                if isinstance(output, CudaTensor):
                    output.known = value
        return result

    def _shaped(
        self, func: Any, args: Any, kwargs: Any, leaves: Sequence[Any], device: torch.device
    ) -> tuple[Any, bool]:
        """The operation's result without values, and whether some of it is in new memory.

        Shapes are remembered for operations that make new tensors or change their inputs, since meta tensors are slow.
        """
        key = (func, tuple(kwargs), *map(_described, (*args, *kwargs.values())))
        with torch.inference_mode(False):  # views of ordinary tensors must be ordinary tensors
            shapes = self._shapes.get(key)
            if shapes is None:
                metas = func(*_each(_on_meta, args), **{name: _each(_on_meta, value) for name, value in kwargs.items()})
                inputs = {id(leaf.meta): place for place, leaf in enumerate(leaves) if isinstance(leaf, CudaTensor)}
                storages = {leaf.meta.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, CudaTensor)}
                outputs = [leaf for leaf in _leaves((metas,)) if isinstance(leaf, Tensor) and id(leaf) not in inputs]
                num_new = sum(leaf.untyped_storage()._cdata not in storages for leaf in outputs)
                if num_new < len(outputs):  # views
                    wrapped = partial(self._wrapped, device=device, leaves=leaves, inputs=inputs)
                    return _each(wrapped, metas), num_new > 0
                shapes = self._shapes[key] = _each(partial(_shape_of, inputs=inputs), metas)
            made = _each(partial(self._made, device=device, leaves=leaves), shapes)
        return made, any(isinstance(shape, _Shape) for shape in _leaves((shapes,)))

    def _wrapped(self, leaf: Any, device: torch.device, leaves: Sequence[Any], inputs: Mapping[int, int]) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in inputs:  # changed in place
            return leaves[inputs[id(leaf)]]
        self.watch.hold(leaf)
        return CudaTensor(leaf, device)

    def _made(self, shape: Any, device: torch.device, leaves: Sequence[Any]) -> Any:
        match shape:
            case _Changed(place):
                return leaves[place]
            case _Shape(sizes, strides, dtype):
                meta = torch.empty_strided(sizes, strides, dtype=dtype, device="meta")
                self.watch.hold(meta)
                return CudaTensor(meta, device)
        return shape

    # What reads the device's data. `_SPECIAL` names their operators.

    def _read_number(self, func: Any, tensor: Tensor) -> Any:
        self.watch.wait("item")
        return self.read(tensor).item()

    def _copy_to(self, func: Any, tensor: Tensor, **kwargs: Any) -> Any:
        target = kwargs.get("device")
        if target is None or torch.device(target).type == tensor.device.type:
            return NotImplemented
        if not kwargs.get("non_blocking"):
            self.watch.wait("copy")
        if torch.device(target).type == "cpu":
            return func(self.read(tensor), **kwargs)
        self.watch.kernels["copy"] += 1
        return self._on_device(tensor, _device(target), kwargs.get("dtype") or tensor.dtype)

    def _copy_into(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Any:
        if target.device.type == source.device.type:
            return NotImplemented
        if not non_blocking:
            self.watch.wait("copy")
        if target.device.type == "cuda":
            return NotImplemented
        return target.copy_(self.read(source))

    def _find(self, func: Any, mask: Tensor) -> Any:
        self.watch.wait("nonzero")
        return self._on_device(func(self.read(mask)), mask.device, torch.int64)

    def _pick(self, func: Any, tensor: Tensor, indices: Sequence[Tensor | None]) -> Any:
        if any(index is not None and index.device.type == "cpu" and index.dim() for index in indices):
            self.watch.wait("index from the host")
        if not any(index is not None and index.dtype is torch.bool for index in indices):
            return NotImplemented
        places: list[Tensor | None] = []
        for index in indices:
            found = index.nonzero().unbind(1) if index is not None and index.dtype is torch.bool else (index,)
            places += found
        return func(tensor, places)

    def _rms_norm(self, func: Any, tensor: Tensor, shape: Sequence[int], weight: Tensor | None, eps: Any) -> Any:
        # One kernel on CUDA. A build for CPUs knows its decomposition alone.
        self.watch.kernels["_fused_rms_norm"] += 1
        return torch.empty_like(tensor), tensor.new_empty(
            tensor.shape[: -len(shape)] + (1,) * len(shape), dtype=torch.float32
        )

    def _upsample(self, func: Any, tensor: Tensor, sizes: Any, factors: Any = None, *args: Any) -> Any:
        # One kernel on CUDA. What PyTorch would decompose it to makes larger tensors.
        if not isinstance(factors, list | tuple):
            return NotImplemented
        sizes = sizes or [int(side * factor) for side, factor in zip(tensor.shape[2:], factors, strict=True)]
        return func.overloadpacket.default(tensor, sizes)

    def _attention(
        self,
        func: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        # One kernel on CUDA for all masks and widths. A build for CPUs would make the whole matrix.
        self._check("attention", (query, key, value), {query.device})
        self.watch.kernels["attention"] += 1
        *batch, length, _ = query.shape
        torch.empty(*batch, length, dtype=torch.float32, device=query.device)  # the log of the sums
        return query.new_empty(*batch[:-1], length, batch[-1], value.shape[-1]).transpose(-2, -3)

    def _on_device(self, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A copy of a tensor on the CPU."""
        with _disable_current_modes(), torch.inference_mode(False):
            meta = torch.empty_like(tensor, dtype=dtype, device="meta")
            self.watch.hold(meta)
            return CudaTensor(meta, device, tensor.to(dtype) if tensor.numel() <= _KNOWN_ELEMENTS else None)

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor on the CPU, with its known values or with others."""
        if not isinstance(tensor, CudaTensor):
            return tensor
        if tensor.known is not None:
            return tensor.known
        with _disable_current_modes():
            if tensor.numel() > _KNOWN_ELEMENTS or not tensor.dtype.is_floating_point:
                return torch.zeros(tensor.shape, dtype=tensor.dtype)
            if self.logit is not None:
                return torch.full(tensor.shape, self.logit, dtype=tensor.dtype)
            return (8 * torch.rand(tensor.shape, generator=self._rng) - 4).to(tensor.dtype)

    def _known(self, func: Any, name: str, args: Any, kwargs: Any, cuda: Sequence[CudaTensor]) -> Any:
        """The operation's result where it is small and its inputs are known. Changes known inputs as it does."""
        if name == "topk" and cuda[0].known is None:
            return self._even_choice(*args, **kwargs)
        if any(tensor.known is None for tensor in cuda) or "empty" in name or _is_random(func):
            if func._schema.is_mutable and cuda:
                cuda[0].known = None
            return None
        if not cuda and not _is_small_factory(args):
            return None
        result = func(*_each(_on_cpu, args), **{name: _each(_on_cpu, value) for name, value in kwargs.items()})
        is_small = all(leaf.numel() <= _KNOWN_ELEMENTS for leaf in _leaves((result,)) if isinstance(leaf, Tensor))
        return result if is_small else None

    def _even_choice(self, tensor: Tensor, k: int, dim: int = -1, *args: Any) -> tuple[None, Tensor]:
        """What topk chooses from unknown numbers: each in turn."""
        shape = list(tensor.shape)
        shape[dim], num_choices = k, tensor.shape[dim]
        return None, (torch.arange(tensor.numel() // num_choices * k) % num_choices).view(shape)

    def _check(self, name: str, inputs: Sequence[Tensor], devices: set[torch.device]) -> None:
        kinds = {tensor.dtype for tensor in inputs if tensor.dtype in _FLOATS and tensor.dim()}
        if len(kinds) > 1 and name.startswith(_ONE_TYPE):
            self.watch.faults[f"{name} of {', '.join(sorted(map(str, kinds)))} at {_place()}"] += 1
        elsewhere = {tensor.device for tensor in inputs if tensor.dim()} - {next(iter(devices))}
        if elsewhere and name not in _TAKES_HOST_INDICES:
            raise RuntimeError(f"{name}: expected all tensors on {devices}, but found some on {elsewhere}")


_SPECIAL: Mapping[str, Callable[..., Any]] = {
    "_local_scalar_dense": FakeGpu._read_number,
    "_to_copy": FakeGpu._copy_to,
    "copy_": FakeGpu._copy_into,
    "nonzero": FakeGpu._find,
    "index": FakeGpu._pick,
    "_fused_rms_norm": FakeGpu._rms_norm,
    "upsample_nearest2d": FakeGpu._upsample,
    "_upsample_nearest_exact2d": FakeGpu._upsample,
    "scaled_dot_product_attention": FakeGpu._attention,
}
_TAKES_HOST_INDICES = ("index", "index_put", "index_put_", "copy_")


@cache
def _is_composite(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)


@cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _unpinned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The factory without pinned memory, which is ordinary memory here."""

    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return make(*args, **kwargs)

    return made


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which would swap fake parameters in place, and can't. Parameters that are shared stay so."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    with torch.no_grad():
                        changed = fn(parameter)
                    is_same = changed is parameter
                    moved[id(parameter)] = parameter if is_same else nn.Parameter(changed, parameter.requires_grad)
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else fn(buffer)
    return module


@dataclass(frozen=True, slots=True)
class _Shape:
    """A new tensor among an operation's results."""

    sizes: Sequence[int]
    strides: Sequence[int]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Changed:
    """An input among an operation's results, by its place among the inputs."""

    place: int


def _shape_of(leaf: Any, inputs: Mapping[int, int]) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if id(leaf) in inputs:
        return _Changed(inputs[id(leaf)])
    return _Shape(tuple(leaf.shape), leaf.stride(), leaf.dtype)


def _described(value: Any) -> Any:
    """What an operation's result may depend on, other than numbers in tensors. 1, 1.0 and True are different."""
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


def _leaves(values: Sequence[Any]) -> list[Any]:
    """Operators take and give lists at most, no deeper trees."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, list | tuple):
            found += value
        else:
            found.append(value)
    return found


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_each(function, item) for item in value]
    return function(value)


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, CudaTensor):
        return leaf.meta
    if isinstance(leaf, Tensor):  # a number, or indices
        return leaf.to("meta")
    return torch.device("meta") if _is_cuda(leaf) else leaf


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, CudaTensor):
        return leaf.known
    return torch.device("cpu") if _is_cuda(leaf) else leaf


def _is_cuda(leaf: Any) -> bool:
    return isinstance(leaf, torch.device) and leaf.type == "cuda"


def _device(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    return torch.device(device.type, device.index or 0)


def _is_small_factory(args: Any) -> bool:
    """Whether the sizes or bounds in a factory's arguments allow its result to be made on the CPU, too."""
    size = math.prod(max(abs(number), 1) for number in _leaves(args) if isinstance(number, int | float))
    return size <= _KNOWN_ELEMENTS


def _place() -> str:
    """The innermost line of our code, and that of a library which it called."""
    frames = [frame for frame in traceback.extract_stack() if "fake_cuda" not in frame.filename]
    ours = [f for f in frames if f.filename.startswith((f"{_ROOT}/models", f"{_ROOT}/service"))][-1:]
    theirs = [f for f in frames if "diffusers" in f.filename or "transformers" in f.filename][-1:]
    return " in ".join(
        f"{f.filename.removeprefix(_ROOT + '/').split('site-packages/')[-1]}:{f.lineno}" for f in ours + theirs
    )
