"""Loading the network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.background.remover import BackgroundRemover
from models.errors import WeightsError
from models.weights import sha256
from models.zoo import load_engine
from tests.fixtures.cut_outs import REMOVER


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(REMOVER, tmp_path / "u2netp"))


def test_changed_weights_are_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["fusion.bias"] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"model\.safetensors is not the file that .* names"):
        BackgroundRemover.load(folder)


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    (folder / "manifest.json").write_text(json.dumps({"sha256": {"model.safetensors": sha256(path)}}))
    with pytest.raises(WeightsError, match="does not hold U²-Net-p"):
        BackgroundRemover.load(folder)


def test_folder_without_a_remover_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"manifest\.json can't be read"):
        load_engine([], device="cpu", router_weights=tmp_path, background_remover=tmp_path)
