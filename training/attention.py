"""Attention for training on CPUs."""

from torch import Tensor
from torch.nn import functional as F


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`F.scaled_dot_product_attention` of `(..., tokens, channels)`, by two matrix products."""
    scores = (query * query.shape[-1] ** -0.5) @ key.mT
    return scores.softmax(dim=-1) @ value


def use_matrix_products() -> None:
    """Let all attention of this process be `attend`.

    For some hundred tokens the backward pass of torch's own takes a CPU six times as long in bfloat16.
    """
    F.scaled_dot_product_attention = attend  # type: ignore[assignment]  # it has more arguments, which nobody gives
