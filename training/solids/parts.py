"""Descriptions of a solid's parts as numbers that a network can predict: kind, position, rotation and size."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.solids.primitives import half_sides
from training.solids.solids import KINDS, Solid

NUM_KINDS = 2 * len(KINDS)
"""Each kind of primitive counts twice: once as a solid part, once as a part that is cut away."""

NUM_VECTORS = 5


class PartDescriptions(NamedTuple):
    """`kinds` `(solids, 2)` are below `NUM_KINDS`, `vectors` are `(solids, 2, NUM_VECTORS, 3)`. Missing parts have 0.

    The vectors are a part's centre, the three rows of `R diag(h) R^T` with its rotation `R` and its half sides `h`, and
    the vector from a cone's centre to its tip (0 for other kinds). Rotations that map a part to itself don't change
    these vectors.
    """

    kinds: Tensor
    vectors: Tensor


def describe(solids: Sequence[Solid]) -> PartDescriptions:
    kinds = np.zeros((len(solids), 2), np.int64)
    vectors = np.zeros((len(solids), 2, NUM_VECTORS, 3), np.float32)
    for row, solid in enumerate(solids):
        for slot, part in enumerate(solid.parts):
            is_cut_away = slot == 1 and solid.operation == "cut"
            kinds[row, slot] = KINDS.index(part.kind) + len(KINDS) * is_cut_away
            rotation, half = np.array(part.rotation), half_sides(part.kind, np.array(part.size))
            tip = rotation[:, 1] * half[1] * (part.kind == "cone")
            vectors[row, slot] = np.vstack((part.centre, (rotation * half) @ rotation.T, tip))
    return PartDescriptions(torch.from_numpy(kinds), torch.from_numpy(vectors))
