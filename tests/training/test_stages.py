import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from models.elastic.router import RouterStack
from models.weights import RouterWeights, load_router_weights, read_manifest, save_router_weights
from training.prompts import calibration_scenes
from training.scenes import Scene
from training.stages import Recipe, describe_routers
from training.text import Text
from training.tiny_flux import TinyFlux
from training.tiny_qwen_image import TinyQwenImage


class Captions:
    """Words without encoders: building tokenizers takes seconds."""

    def __init__(self) -> None:
        self.encoders: dict[str, torch.nn.Module] = {}

    def caption(self, scene: Scene) -> str:
        return scene.long_caption

    def encode(self, prompts: Sequence[str]) -> Text:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("recipe", "size"), [(TinyFlux(), (None, None)), (TinyQwenImage(), (128, 128))], ids=["flux", "qwen_image"]
)
def test_serving_reads_what_training_says_of_its_routers(
    recipe: Recipe, size: tuple[int | None, int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen-Image's pictures would be of 1024 pixels a side if the manifest named no size."""
    # Given a trained checkpoint and routers
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(recipe), "conditioner", lambda self: Captions())
    checkpoint, folder = Path("checkpoints") / recipe.name, Path("router_weights") / recipe.name
    (checkpoint / "transformer").mkdir(parents=True)
    (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    save_router_weights(RouterWeights(RouterStack(2, 8, hidden=4), {}), folder)
    # When they are described
    describe_routers(recipe, folder)
    # Then the engine finds terms, defaults and files
    manifest = read_manifest(folder)
    assert manifest.license == "Apache-2.0"
    assert (manifest.num_inference_steps, manifest.guidance_scale) == (20, 3.0)
    assert (manifest.height, manifest.width) == size
    assert load_router_weights(folder, checkpoint) is not None
    assert json.loads((folder / "manifest.json").read_text())["training_command"].split()[2] == type(recipe).__module__
    prompts = (folder / "calibration_prompts.txt").read_text().splitlines()
    assert prompts == [scene.long_caption for scene in calibration_scenes(32)]
