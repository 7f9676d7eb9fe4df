"""The optimiser step that every training run shares."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from training.muon import Muon

MAX_GRADIENT_NORM = 1.0


class ScheduledOptimizers:
    """Optimisers that take each step together, at their base learning rates times `schedule(step)`.

    The base rates are the rates at construction. Gradients are averaged over `num_processes` and clipped to a common
    norm of `MAX_GRADIENT_NORM`.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], schedule: Callable[[int], float], *, num_processes: int = 1
    ) -> None:
        self._optimizers = optimizers
        self._schedule = schedule
        self._num_processes = num_processes
        self._base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        self._parameters: list[nn.Parameter] = [
            parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"]
        ]

    def minimise(self, loss: Tensor, step: int) -> None:
        """Back-propagate `loss` and take optimiser step number `step`."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        average_gradients(self._parameters, self._num_processes)
        nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
        factor = self._schedule(step)
        # Resuming replaces the groups, so they are looked up at every step.
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group, base_rate in zip(groups, self._base_rates, strict=True):
            group["lr"] = base_rate * factor
        for optimizer in self._optimizers:
            optimizer.step()


def warm_then_linear(step: int, num_steps: int, *, warm_up: int, hold: float, end: float) -> float:
    """Learning-rate factor: rises for `warm_up` steps, stays at 1 until the share `hold` of the run, falls to `end`."""
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step / num_steps - hold) / (1 - hold)
    return 1 - (1 - end) * min(max(progress, 0.0), 1.0)


def split_optimizers(module: nn.Module, *, matrix_lr: float, lr: float) -> tuple[Optimizer, Optimizer]:
    """Muon for the matrices inside the blocks; AdamW for all other parameters, modulations and gates included."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            is_other = any(part in name for part in ("norm", "_mod.", ".gate."))
            is_inside = ("blocks." in name or ".layer." in name) and parameter.ndim == 2 and not is_other
            (matrices if is_inside else others).append(parameter)
    return (
        Muon(matrices, lr=matrix_lr),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    )


def average_gradients(parameters: Sequence[nn.Parameter], num_processes: int) -> None:
    """Average gradients over processes in one exchange. A gradient that a process lacks counts as zero."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if num_processes == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= num_processes
    offset = 0
    for p in parameters:
        assert p.grad is not None
        p.grad.copy_(flat[offset : offset + p.numel()].view_as(p))
        offset += p.numel()
