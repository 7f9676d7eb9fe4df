"""What the parts of a solid are, as numbers that a network can name: where they lie, how they are turned, how large."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.solids.solids import KINDS, Solid, half_sides

NUM_KINDS = 2 * len(KINDS)
"""Each kind of primitive, and each as what is cut away."""

NUM_VECTORS = 5


class Parts(NamedTuple):
    """`kinds` `(solids, 2)` are below `NUM_KINDS`, `vectors` `(solids, 2, NUM_VECTORS, 3)`; 0 where there is no part.

    The vectors are a part's centre, the three rows of `R diag(h) R^T` for its rotation `R` and its half sides `h`, and
    for cones the way from the centre to the tip, else 0. So turns that leave a part as it is don't change them.
    """

    kinds: Tensor
    vectors: Tensor


def describe(solids: Sequence[Solid]) -> Parts:
    kinds = np.zeros((len(solids), 2), np.int64)
    vectors = np.zeros((len(solids), 2, NUM_VECTORS, 3), np.float32)
    for row, solid in enumerate(solids):
        for slot, part in enumerate(solid.parts):
            is_cut_away = slot == 1 and solid.operation == "cut"
            kinds[row, slot] = KINDS.index(part.kind) + len(KINDS) * is_cut_away
            rotation, half = np.array(part.rotation), half_sides(part.kind, np.array(part.size))
            tip = rotation[:, 1] * half[1] * (part.kind == "cone")
            vectors[row, slot] = np.vstack((part.centre, (rotation * half) @ rotation.T, tip))
    return Parts(torch.from_numpy(kinds), torch.from_numpy(vectors))
