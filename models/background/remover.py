"""Finds the object in front of any background: U²-Net-p, then two graph cuts that use its own colours.

The network alone also marks salient things of the background, and fills holes. docs/experiments.md says how much each
part helps.
"""

from functools import lru_cache
from pathlib import Path
from typing import Self

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from models.background.u2net import U2NetP
from models.errors import WeightsError
from models.weights import read_json, sha256

WEIGHTS, MANIFEST = "model.safetensors", "manifest.json"

_SIDE = 320
"""Height and width of the network's input, as in its training."""
_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
_DEVIATION = np.array((0.229, 0.224, 0.225), np.float32)
_CUT_SIDE = 160
"""Height and width of the first graph cut."""
_CUTS = 6
_NUM_COLOURS = 5
"""Of the object and of the background, in a graph cut."""
_SURELY_BACKGROUND = 0.1
_SQUARE = np.ones((5, 5), np.uint8)
_SPECK_SHARE = 0.01
_FINE_SIDE = 512
"""The longer side of the picture in which the outline is moved to its edges."""
_DISC = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (21, 21))
"""How far it may move. It is then a pixel wide or less: a wider one takes colours of the background along, and shifts
the object when it is centred."""


def _frame(width: int) -> NDArray[np.bool_]:
    """The outermost pixels of the first graph cut's picture."""
    return np.pad(np.zeros(2 * (_CUT_SIDE - 2 * width,), bool), width, constant_values=True)


_BORDER, _FRAME = _frame(1), _frame(3)


class BackgroundRemover:
    def __init__(self, network: U2NetP) -> None:
        self.network = network.eval().requires_grad_(False)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its types lack this form

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises WeightsError if the folder lacks a file, or a file is not what it should be."""
        digests = read_json(folder / MANIFEST).get("sha256")
        path = folder / WEIGHTS
        if not isinstance(digests, dict) or not path.is_file() or sha256(path) != digests.get(WEIGHTS):
            raise WeightsError(f"{path} is not the file that {folder / MANIFEST} names: its sha256 differs")
        network = U2NetP()
        try:
            network.load_state_dict(load_file(path))
        except RuntimeError as error:
            raise WeightsError(f"{path} does not hold U²-Net-p: {error}") from error
        return cls(network)

    def alpha(self, colours: np.ndarray, *, is_whole: bool) -> NDArray[np.uint8]:
        """The object's alpha `(height, width)` in a picture `(height, width, 3)`; 0 everywhere if there is none.

        `is_whole` says that the picture shows all of the object, so that things which go on beyond the border are
        background.
        """
        small = cv2.resize(colours, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
        probabilities = self.probabilities(small)
        return _fine(colours, _confined(probabilities, _cut(small, probabilities, is_whole)))

    @torch.inference_mode()
    def probabilities(self, colours: np.ndarray) -> NDArray[np.float32]:
        """The network's probability of the object at each pixel of a picture `(_SIDE, _SIDE, 3)`."""
        normalised = (colours / np.float32(255) - _MEAN) / _DEVIATION
        pixels = torch.from_numpy(normalised).permute(2, 0, 1)[None]  # in memory, channels are last
        probabilities: NDArray[np.float32] = self.network(pixels)[0].numpy()
        return probabilities


def _cut(colours: np.ndarray, probabilities: NDArray[np.float32], is_whole: bool) -> NDArray[np.uint8]:
    """1 where the object is, `(_CUT_SIDE, _CUT_SIDE)`: GrabCut (Rother et al. 2004) that begins with `probabilities`.

    It moves pixels to the side whose colours they have, unless they are far from the object. If the object is whole,
    the border is background, and so are the colours that are there.
    """
    size = (_CUT_SIDE, _CUT_SIDE)
    small = cv2.resize(colours, size, interpolation=cv2.INTER_AREA)
    likely = cv2.resize(probabilities, size, interpolation=cv2.INTER_AREA)
    is_object = (likely > 0.5).astype(np.uint8)
    if is_whole:
        is_object = _inner_parts(is_object)
    labels = np.where(is_object, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    if is_whole:
        labels[_FRAME] = cv2.GC_BGD
    labels[cv2.erode((likely < _SURELY_BACKGROUND).astype(np.uint8), _SQUARE) == 1] = cv2.GC_BGD
    mask = _graph_cut(small, labels, rounds=_CUTS)
    return _inner_parts(mask) if is_whole else mask


def _inner_parts(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Without the connected parts that touch the border, if one that is no speck is left."""
    _, parts = cv2.connectedComponents(mask)
    is_inner = mask * ~np.isin(parts, parts[_BORDER])
    return is_inner if is_inner.mean() > _SPECK_SHARE else mask


def _confined(probabilities: NDArray[np.float32], mask: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The probabilities near the outline of `mask`, where they are finer than it; its own values elsewhere."""
    size = probabilities.shape[::-1]
    inner, outer = (cv2.resize(change(mask, _SQUARE).astype(np.float32), size) for change in (cv2.erode, cv2.dilate))
    return np.maximum(np.minimum(probabilities, outer), inner)


def _fine(colours: np.ndarray, probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Alpha `(height, width)` of a picture. A graph cut moves the outline to the edges nearby."""
    height, width = colours.shape[:2]
    scale = min(1.0, _FINE_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    shown = cv2.resize(colours, size, interpolation=cv2.INTER_AREA)
    mask = (cv2.resize(probabilities, size) > 0.5).astype(np.uint8)
    inner, outer = cv2.erode(mask, _DISC), cv2.dilate(mask, _DISC)
    labels = np.where(mask, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[inner == 1], labels[outer == 0] = cv2.GC_FGD, cv2.GC_BGD
    blurred = cv2.GaussianBlur(_graph_cut(shown, labels, rounds=1).astype(np.float32), (3, 3), 0)
    alpha = np.clip(2 * blurred - 0.5, 0, 1)  # corners are soft, straight outlines stay where they are
    full: np.ndarray = cv2.resize(alpha, (width, height)) * 255
    return full.round().astype(np.uint8)


def _graph_cut(colours: np.ndarray, labels: NDArray[np.uint8], rounds: int) -> NDArray[np.uint8]:
    """1 where the object is, as GrabCut finds from OpenCV's `labels`; their own sides if one has too few pixels."""
    mask = (labels & 1).astype(np.uint8)  # GC_FGD and GC_PR_FGD are odd
    if not _NUM_COLOURS <= mask.sum() <= mask.size - _NUM_COLOURS:
        return mask
    cv2.setRNGSeed(0)  # of this thread, for the clusters of colours
    cv2.grabCut(colours, labels, (0, 0, 0, 0), np.zeros((1, 65)), np.zeros((1, 65)), rounds, cv2.GC_INIT_WITH_MASK)
    return (labels & 1).astype(np.uint8)


@lru_cache(maxsize=1)
def load_remover(folder: Path) -> BackgroundRemover:
    """`BackgroundRemover.load`, once in a process, which has one remover at most."""
    return BackgroundRemover.load(folder)
