"""Published folders are loaded as they are, and what does not fit is named."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from models.errors import WeightsError
from models.families.hunyuan3d.checkpoint import Hunyuan3DCheckpoint, load_checkpoint
from models.families.hunyuan3d.layout import read_config
from models.zoo import load_engine

FILE = "model.safetensors"


@pytest.fixture(params=["tiny_plain_hunyuan3d", "tiny_stream_hunyuan3d"])
def published(request: pytest.FixtureRequest) -> Path:
    directory: Path = request.getfixturevalue(request.param)
    return directory


@pytest.fixture
def folder(published: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Hunyuan3DCheckpoint:
    return load_checkpoint(directory, "cpu", dtype)


def tensors_of(checkpoint: Hunyuan3DCheckpoint) -> dict[str, torch.Tensor]:
    parts = {"model": checkpoint.denoiser, "vae": checkpoint.vae, "conditioner": checkpoint.conditioner}
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / FILE)
    edit(tensors)
    save_file(tensors, folder / FILE)


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    edit(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_every_tensor_of_the_file_is_loaded(published: Path) -> None:
    loaded, expected = tensors_of(load(published)), load_file(published / FILE)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert not any(tensor.requires_grad for tensor in loaded.values())


def test_field_is_decoded_in_half_precision_where_the_denoiser_is_in_bfloat16(published: Path) -> None:
    types = {
        name.partition(".")[0]: tensor.dtype for name, tensor in tensors_of(load(published, torch.bfloat16)).items()
    }
    assert types == {"model": torch.bfloat16, "vae": torch.float16, "conditioner": torch.bfloat16}


def test_folder_of_a_repository_is_found_among_others(published: Path, tmp_path: Path) -> None:
    repository = tmp_path / "Hunyuan3D"
    shutil.copytree(published, repository / "hunyuan3d-dit-v2-1")
    (repository / "hunyuan3d-dit-v2-1" / FILE).rename(repository / "hunyuan3d-dit-v2-1" / "model.fp16.safetensors")
    (repository / "hunyuan3d-vae-v2-1").mkdir()
    (repository / "hunyuan3d-vae-v2-1" / "config.yaml").write_text("target: published.ShapeVAE\nparams: {}\n")
    assert torch.equal(load(repository).vae.post_kl.weight, load(published).vae.post_kl.weight)
    assert list(load_engine([repository], device="cpu", router_weights=tmp_path).cards) == ["Hunyuan3D"]
    shutil.copytree(published, repository / "hunyuan3d-dit-v2-1-turbo")
    with pytest.raises(WeightsError, match="several models: hunyuan3d-dit-v2-1, hunyuan3d-dit-v2-1-turbo"):
        load(repository)


def test_encoder_of_the_shape_vae_may_be_absent(folder: Path) -> None:
    is_of_encoder = ("vae.encoder.", "vae.pre_kl.")
    edit_tensors(folder, lambda t: [t.pop(name) for name in [*t] if name.startswith(is_of_encoder)])
    vae = load(folder).vae
    assert vae.encoder is None
    latents = torch.ones(1, 12, 4)
    assert vae.field(latents)(torch.zeros(1, 3)).isfinite().all()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("vae.post_kl.bias"), r"missing: vae\.post_kl\.bias$"),
        (lambda t: t.pop("vae.encoder.ln_post.bias"), r"missing: vae\.encoder\.ln_post\.bias$"),
        (lambda t: t.pop("vae.post_kl.weight"), r"post_kl\.weight is missing"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), rf"surplus: model\.extra in {FILE}$"),
        (lambda t: t.update({"extra": torch.zeros(1)}), rf"surplus: extra in {FILE}$"),
        (
            lambda t: t.update({"model.final_layer.linear.bias": torch.zeros(3)}),
            rf"misshapen: model\.final_layer\.linear\.bias in {FILE}, \[3\] for \[4\]$",
        ),
        (lambda t: [t.pop(name) for name in [*t] if name.startswith("vae.")], r"no tensor named vae\."),
        (lambda t: [t.pop(name) for name in [*t] if name.startswith("model.")], "missing: model.* more$"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder: Path, edit: Callable[[Any], Any], message: str) -> None:
    edit_tensors(folder, edit)
    with pytest.raises(WeightsError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("vae"), "no proper entry 'vae'"),
        (lambda c: c["vae"].pop("target"), "no proper entry 'vae'"),
        (lambda c: c["vae"].update(target="other.VAE"), "vae is of class VAE; known: ShapeVAE"),
        (lambda c: c["vae"]["params"].pop("width"), "vae can't be built of its params: .*width"),
        (
            lambda c: c["model"].update(target="other.DiT"),
            "model is of class DiT; known: HunYuanDiTPlain, Hunyuan3DDiT",
        ),
        (lambda c: c["model"]["params"].update(num_heads=3), "hidden_size 32 is not a multiple of num_heads 3"),
        (lambda c: c["scheduler"].update(target="other.DDIM"), "scheduler is of class DDIM; known: Flow"),
        (lambda c: c["image_processor"].update(target="other.P"), "image_processor is of class P; known: ImageP"),
    ],
)
def test_configuration_that_can_not_be_served_is_named(folder: Path, edit: Callable[[Any], Any], message: str) -> None:
    edit_config(folder, edit)
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_settings_without_effect_are_ignored(folder: Path) -> None:
    edit_config(folder, lambda c: c["model"]["params"].update(input_size=4096, text_len=1370, theta=10000))
    load(folder)


def test_pickle_is_not_read_but_told_how_to_convert(folder: Path) -> None:
    (folder / FILE).rename(folder / "model.fp16.ckpt")
    with pytest.raises(WeightsError, match=r"elastic-dit convert --format hunyuan3d --src .*model\.fp16\.ckpt"):
        load(folder)


def test_damaged_and_absent_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / FILE).write_bytes(b"no tensors")
    with pytest.raises(WeightsError, match=rf"{FILE} can't be loaded"):
        load(folder)
    (folder / FILE).unlink()
    with pytest.raises(WeightsError, match=rf"has no {FILE} or model.fp16.safetensors"):
        load(folder)
    for content, message in (("- 1\n", "is not a mapping"), ("a: [", "can't be read")):
        (folder / "config.yaml").write_text(content)
        with pytest.raises(WeightsError, match=message):
            load_engine([folder], device="cpu", router_weights=tmp_path)
    with pytest.raises(WeightsError, match=r"has no config\.yaml"):
        load(tmp_path / "nowhere")


def test_schedule_is_the_one_configured(folder: Path) -> None:
    checkpoint = load(folder)
    assert checkpoint.is_consistency_model
    assert checkpoint.schedule(5).tolist() == pytest.approx([0, 0.199199, 0.399399, 0.5996, 0.7998, 1], abs=1e-6)
    edit_config(folder, lambda c: c.update(scheduler={"target": "x.FlowMatchEulerDiscreteScheduler"}))
    checkpoint = load(folder)
    assert not checkpoint.is_consistency_model
    assert checkpoint.schedule(5).tolist() == [0, 0.25, 0.5, 0.75, 1, 1]


def test_numbers_with_an_exponent_but_no_point_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1e-6\nb: 1.e-6\nc: -2E3\nd: e5\ne: 17\nf: 1.0.0\n")
    config = read_config(tmp_path / "config.yaml")
    assert config == {"a": 1e-6, "b": 1e-6, "c": -2000.0, "d": "e5", "e": 17, "f": "1.0.0"}
