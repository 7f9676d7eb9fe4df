"""Numbers between the host and the device, without waits for more than their own copy."""

from typing import Any

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> list[Any]:
    """`tensor.tolist()`. On a GPU it waits for the work that its thread has queued until now, and for nothing else."""
    if not tensor.is_cuda:
        return list(tensor.tolist())
    copy = tensor.to("cpu", non_blocking=True)  # into pinned memory
    wait_for_work(tensor.device)
    return list(copy.tolist())


def wait_for_work(device: torch.device) -> None:
    """Wait for what this thread has queued on a GPU, and not for the streams of other threads."""
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    done.synchronize()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on `device`. Copied from pinned memory: an ordinary copy waits for all queued work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
