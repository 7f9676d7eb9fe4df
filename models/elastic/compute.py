"""Counting compute: floating-point operations of blocks, by the sizes that really ran."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One row's floating-point operations in one block, two for each multiply-add.

    `fixed` is everything but the MLP that may be narrowed, which costs `mlp` at full width.
    """

    fixed: float
    mlp: float

    @property
    def dense(self) -> float:
        return self.fixed + self.mlp

    def at_width(self, mlp_width: float) -> float:
        return self.fixed + self.mlp * mlp_width


def attention_flops(num_tokens: int, channels: int) -> float:
    """Scores and weighted sum of full attention over `num_tokens`, all heads together."""
    return 4.0 * num_tokens * num_tokens * channels
