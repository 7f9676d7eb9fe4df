import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from models.card import MeshCard
from models.elastic.router import RouterStack
from models.weights import RouterWeights, load_router_weights, read_manifest, save_router_weights
from models.zoo import load_engine
from training.lesson import Condition
from training.scenes.prompts import calibration_scenes
from training.scenes.recipe import ImageModel, ImageRecipe
from training.scenes.scenes import Scene
from training.scenes.tiny_flux import TinyFlux
from training.scenes.tiny_qwen_image import TinyQwenImage
from training.solids.image_encoder import build_conditioner
from training.solids.shape_vae import build_shape_vae
from training.solids.tiny_hunyuan3d import TinyHunyuan3D
from training.stages import describe_routers, paths


class Captions:
    """A conditioner without encoders, because building tokenizers takes seconds."""

    def __init__(self) -> None:
        self.encoders: dict[str, torch.nn.Module] = {}

    def caption(self, scene: Scene) -> str:
        return scene.long_caption

    def encode(self, prompts: Sequence[str]) -> Condition:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("model", "size"), [(TinyFlux(), (None, None)), (TinyQwenImage(), (128, 128))], ids=["flux", "qwen_image"]
)
def test_serving_reads_the_manifest_that_training_writes(
    model: ImageModel, size: tuple[int | None, int | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a size in the manifest, Qwen-Image would default to images of 1024 pixels a side."""
    # Given a trained checkpoint and routers
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(type(model), "new_conditioner", lambda self: Captions())
    recipe = ImageRecipe(model)
    checkpoint, folder = Path("checkpoints") / recipe.name, Path("router_weights") / recipe.name
    (checkpoint / "transformer").mkdir(parents=True)
    (checkpoint / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    save_router_weights(RouterWeights(RouterStack(2, 8, hidden=4)), folder)
    # When they are described
    describe_routers(recipe, folder, "python -m the.training")
    # Then the engine finds licence, defaults and files
    manifest = read_manifest(folder)
    assert manifest.license == "Apache-2.0"
    assert (manifest.num_inference_steps, manifest.guidance_scale) == (20, 3.0)
    assert (manifest.height, manifest.width) == size
    assert load_router_weights(folder, checkpoint) is not None
    assert json.loads((folder / "manifest.json").read_text())["training_command"] == "python -m the.training"
    prompts = (folder / "calibration_prompts.txt").read_text().splitlines()
    assert prompts == [scene.long_caption for scene in calibration_scenes(64)]


def test_assembled_shape_model_is_served_with_its_routers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given trained networks and routers
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.solids.tiny_hunyuan3d._NUM_CALIBRATION", 2)
    monkeypatch.setattr(TinyHunyuan3D, "built_in", tmp_path / "pictures")
    recipe = TinyHunyuan3D()
    run_dir, checkpoint, folder = paths(recipe)
    run_dir.mkdir(parents=True)
    torch.save(build_shape_vae().state_dict(), run_dir / "shape_vae.pt")
    torch.save({"conditioner": build_conditioner().state_dict()}, run_dir / "conditioner.pt")
    backbone = recipe.new_backbone()
    # When they are assembled and described
    recipe.assemble(run_dir, backbone, checkpoint)
    save_router_weights(RouterWeights(RouterStack(len(backbone.blocks), backbone.channels, hidden=4)), folder)
    describe_routers(recipe, folder, "python -m the.training")
    # Then the engine serves the model with its licence and defaults
    engine = load_engine([checkpoint], device="cpu", router_weights=folder.parent)
    card = engine.cards["tiny-hunyuan3d"]
    assert isinstance(card, MeshCard)
    assert card.rules == ("dense", "router")
    assert card.license == "Apache-2.0"
    assert (card.default_num_inference_steps, card.default_guidance_scale) == (20, 2.0)
    assert card.default_octree_resolution == 128
    images = sorted((tmp_path / "pictures").iterdir())
    assert [image.name for image in images] == ["00.png", "01.png"]
    loaded = recipe.load_backbone(checkpoint).transformer.state_dict()
    for name, tensor in backbone.transformer.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-3, atol=1e-4)
