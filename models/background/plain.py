"""Cuts an object out of a plain background: one colour or a smooth gradient, with some noise. No torch."""

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.morphology import remove_small_holes, remove_small_objects

# CIE76 colour difference. Noise and compression stay below it.
_VISIBLE = 10.0
# Least share of the border that must be plain. An object's edge may touch it.
_PLAIN_SHARE = 0.99
# Objects are searched for in a copy with at most this side, which bounds memory.
_SEARCH_SIDE = 1024
# Share of that copy's pixels. Smaller regions count neither as objects nor as holes.
_SPECK_SHARE = 0.0005


def plain_background_alpha(colours: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """The object's alpha `(height, width)`, which is 0 on the background; None if the background is not plain.

    `colours` are `(height, width, 3)`. A quadratic is fitted to the colours along the border. Pixels that visibly
    differ from it are the object, so there may be none. Limits: the object must not touch the border, its shadow counts
    as part of it, parts in the background's colour are lost, and the outline is hard.
    """
    height, width = colours.shape[:2]
    scale = min(1.0, _SEARCH_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.medianBlur(cv2.resize(colours, size, interpolation=cv2.INTER_AREA), 5)
    difference = np.linalg.norm(_lab(small / np.float32(255)) - _lab(_background(small)), axis=-1)
    if (_border(difference) < _VISIBLE).mean() < _PLAIN_SHARE:
        return None
    speck = round(_SPECK_SHARE * difference.size)
    mask = remove_small_holes(remove_small_objects(difference >= _VISIBLE, max_size=speck), max_size=speck)
    alpha: NDArray[np.uint8] = cv2.resize(mask.astype(np.uint8) * 255, (width, height)).astype(np.uint8)
    return alpha


def _background(colours: np.ndarray) -> np.ndarray:
    """The quadratic in x and y that fits the border's colours best, at every pixel, in [0, 1]."""
    y, x = np.meshgrid(*(np.linspace(-1, 1, length, dtype=np.float32) for length in colours.shape[:2]), indexing="ij")
    terms = np.stack((np.ones_like(x), x, y, x * x, x * y, y * y), axis=-1)
    coefficients = np.linalg.lstsq(_border(terms), _border(colours / np.float32(255)))[0]
    background: np.ndarray = np.clip(terms @ coefficients, 0, 1)
    return background


def _border(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate((pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]))


def _lab(colours: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(colours, cv2.COLOR_RGB2Lab)
