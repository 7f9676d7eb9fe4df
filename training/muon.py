"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) in the number format the CPU computes fastest.

`torch.optim.Muon` always orthogonalises in bfloat16. A CPU without bfloat16 instructions is 60 times slower at that.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.precision import HAS_FAST_BFLOAT16

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised steps: the singular values of each matrix's step are brought near 1."""

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closures here
        """Take one step with Nesterov momentum."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                step = orthogonalised(matrix.grad.lerp(momentum, group["momentum"]))
                matrix.add_(step, alpha=-group["lr"] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Bring the singular values of `matrix` to between about 0.7 and 1.2 by Newton-Schulz iterations."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.mT if is_tall else matrix
    wide = wide.bfloat16() if HAS_FAST_BFLOAT16 else wide
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide.mT if is_tall else wide).to(matrix.dtype)
