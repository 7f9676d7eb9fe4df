"""The device that models run on: which one a name means, and streams of work on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from models.errors import DeviceError


def find_device(name: str) -> torch.device:
    """The device of this name: cpu, cuda or cuda:N. Raises DeviceError if it is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device and device.type == "cpu":
        return device
    if device and device.type == "cuda" and (device.index or 0) < count:
        return torch.device("cuda", device.index or 0)
    there = ["cpu", *(f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(count))]
    without = "" if count else f"; PyTorch {torch.__version__} finds no GPU"
    raise DeviceError(f"there is no device '{name[:40]}'; there are: {', '.join(there)}{without}")


def encoder_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which text and image encoders of a model in `dtype` run on the CPU.

    Without instructions for bfloat16, a CPU takes many times longer in it than in float32.
    """
    return torch.float32 if dtype is torch.bfloat16 and not cpu_has_bfloat16() else dtype


def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for bfloat16."""
    # For x86 the second says only that bfloat16 can be emulated.
    is_x86 = torch.cpu._is_avx2_supported()
    return bool(torch.cpu._is_avx512_bf16_supported() if is_x86 else torch.ops.mkldnn._is_mkldnn_bf16_supported())


class SideStream:
    """Work beside the denoise steps: a CUDA stream of its own, so that neither waits for the other. None on a CPU.

    What `used` encloses may read tensors of finished steps. It may be in one thread at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def used(self) -> Iterator[None]:
        """Ends when all work in it has ended on the device. So tensors that it read may be dropped then."""
        if self._device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        with torch.cuda.stream(self._stream):  # makes its device the thread's current one, too
            try:
                yield
            finally:
                self._stream.synchronize()


def hand_to_steps(value: object, device: torch.device) -> None:
    """Let denoise steps use the tensors in `value`, a tuple or a data class, that were made on a side stream.

    Else their memory could be used again there while a step still reads it.
    """
    if isinstance(value, Tensor):
        if _is_on_gpu(value):
            value.record_stream(torch.cuda.default_stream(device))
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            hand_to_steps(getattr(value, field.name), device)
    elif isinstance(value, tuple | list):
        for part in value:
            hand_to_steps(part, device)


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
