"""`u2netp`: the network of the shipped background remover, recorded from the published ONNX file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.background.remover import BackgroundRemover

FOLDER = Path(__file__).parents[2] / "checkpoints" / "u2netp"


def test_probabilities_are_as_recorded(recorded: Callable[[str], Any]) -> None:
    recording = recorded("u2netp")
    repeat, stride = recording.settings["repeat"], recording.settings["stride"]
    pictures = recording.tensors["pixels"].repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
    mean, deviation = (torch.tensor(recording.settings[name]) for name in ("mean", "std"))
    network = BackgroundRemover.load(FOLDER).network
    with torch.inference_mode():
        found = network(((pictures / 255 - mean) / deviation).permute(0, 3, 1, 2))
    expected = recording.tensors["probabilities"]
    assert (expected > 0.5).any((1, 2)).all()
    torch.testing.assert_close(found[:, ::stride, ::stride], expected, atol=1e-4, rtol=0)
