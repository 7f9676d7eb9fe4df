"""Cuts the object out of a picture: a plain background by its colour, any other by a network.

Imports torch only for a background that is not plain.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from models.background.plain import plain_background_alpha

_LEAST_SHARE, _MOST_SHARE = 0.001, 0.98
"""Shares of the pixels. What covers less is no object, and what covers more leaves no background."""


class NotCutOut(Exception):
    """No object can be cut out. The message says why, as a sentence without its subject, the picture."""


def object_alpha(colours: NDArray[np.uint8], remover: Path | None, *, is_whole: bool) -> NDArray[np.uint8]:
    """The object's alpha `(height, width)` in a picture `(height, width, 3)`, 0 on the background.

    `remover` is the folder of `models.background.remover`; without it, only plain backgrounds are removed. `is_whole`
    says that the picture shows all of the object. Raises NotCutOut, and WeightsError as `load_remover` does.
    """
    alpha = plain_background_alpha(colours)
    if alpha is None:
        if remover is None:
            raise NotCutOut("has a background that is not plain, and no network that removes others is installed")
        from models.background.remover import load_remover

        alpha = load_remover(remover).alpha(colours, is_whole=is_whole)
    share = (alpha >= 128).mean()
    if share < _LEAST_SHARE:
        raise NotCutOut("shows no object that stands out from its background")
    if share > _MOST_SHARE:
        raise NotCutOut(f"shows no background: what stands out covers {share:.0%} of it")
    return alpha
