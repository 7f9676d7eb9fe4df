"""Counting compute: floating-point operations of blocks, by the sizes that really ran."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockCost:
    """One row's floating-point operations in one block, two for each multiply-add.

    `fixed` is everything but the MLP that may be narrowed, which costs `mlp` at full width. `always` is what the row
    costs at this place even if the block is left out.
    """

    fixed: float
    mlp: float
    always: float = 0.0

    @property
    def dense(self) -> float:
        return self.always + self.fixed + self.mlp

    def at_width(self, mlp_width: float) -> float:
        """Of the block itself, when it runs."""
        return self.fixed + self.mlp * mlp_width


def attention_flops(num_tokens: int, channels: int, num_keys: int | None = None) -> float:
    """Scores and weighted sum of attention from `num_tokens` to `num_keys`, or to themselves, all heads together."""
    return 4.0 * num_tokens * (num_tokens if num_keys is None else num_keys) * channels
