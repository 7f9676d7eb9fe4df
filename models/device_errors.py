"""What errors of PyTorch say about the device: out of memory, lost for this process, or neither."""

import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.errors import DeviceLost, OutOfDeviceMemory
from models.request import GenerationRequest
from models.state import DenoiseState

_OUT_OF_MEMORY = (
    "can't allocate memory",  # PyTorch's allocator for the CPU
    "CUDA error: out of memory",  # memory that does not come from PyTorch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # cuBLAS creates a handle at its first use, and needs memory for it
    "CUDNN_STATUS_ALLOC_FAILED",
    "unable to find an engine to execute this computation",  # cuDNN, where no algorithm gets its workspace
)
"""What messages have in them that are of no class of their own."""


@dataclass(frozen=True, slots=True)
class DeviceErrors:
    """A context that raises OutOfDeviceMemory and DeviceLost in place of the errors of PyTorch that mean them.

    `doing` and `request` say in the message what has failed on `device`. After OutOfDeviceMemory no tensor of what has
    failed is kept, neither by the journals of `states` nor by the frames of a traceback: its text is a note of the
    exception. So what comes next has their memory.
    """

    doing: str
    request: GenerationRequest
    device: torch.device
    states: Sequence[DenoiseState] = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, frames: object) -> None:
        del frames  # this frame outlives them
        if not isinstance(error, Exception):
            return
        for state in self.states:
            state.abandon_step()
        _check_device(error, self.device)
        if _is_out_of_memory(error):
            failure = OutOfDeviceMemory(_out_of_memory(self.doing, self.request, self.device, str(error)))
            failure.add_note("".join(traceback.format_exception(error)))
            _forget_frames(error)
            if self.device.type == "cuda":
                with torch.cuda.device(self.device):
                    torch.cuda.empty_cache()
            raise failure from None


def _is_out_of_memory(error: Exception) -> bool:
    is_of_class = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_of_class or any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _forget_frames(error: BaseException | None) -> None:
    """Let go of the frames of an error and of those that it followed. To clear them isn't enough: closures live on."""
    while error is not None:
        error.__traceback__, error = None, error.__cause__ or error.__context__


def _check_device(error: Exception, device: torch.device) -> None:
    """Raise DeviceLost if the GPU fails another call too.

    CUDA returns an error that has corrupted its context (an illegal access, a failed assertion, broken memory) from
    every later call, and other errors only once. So this needs no list of codes, which differ from version to version.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise DeviceLost(f"the device is lost: {str(error).partition(chr(10))[0]}") from error


def _out_of_memory(doing: str, request: GenerationRequest, device: torch.device, message: str) -> str:
    """What the client reads. PyTorch's message has more, which goes to the log."""
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)", message, re.IGNORECASE)
    more = f"; {wanted[1]} more were needed" if wanted else ""
    total = f", and it has {torch.cuda.mem_get_info(device)[1] / 2**30:.1f} GiB" if device.type == "cuda" else ""
    return f"{doing} {request.model} at {request.size} takes more memory than the device has left{more}{total}"
