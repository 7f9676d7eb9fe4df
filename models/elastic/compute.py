"""Counts compute: floating-point operations of blocks, by the sizes that really ran."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One row's floating-point operations in one block, two for each multiply-add.

    `mlp` is the cost of the MLP that may be narrowed, at full width. `fixed` is that of the rest of the block. `always`
    is spent at this place even if the block is left out.
    """

    fixed: float
    mlp: float
    always: float = 0.0

    @property
    def dense(self) -> float:
        return self.always + self.fixed + self.mlp

    def at_width(self, mlp_width: float) -> float:
        """The cost of the block itself when it runs, without `always`."""
        return self.fixed + self.mlp * mlp_width


def attention_flops(num_tokens: int, channels: int, num_keys: int | None = None) -> float:
    """Scores and weighted sums of all heads, from `num_tokens` queries to `num_keys` keys (by default as many)."""
    return 4.0 * num_tokens * (num_tokens if num_keys is None else num_keys) * channels
